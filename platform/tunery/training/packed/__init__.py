"""Several LoRA trainings on one copy of their base model: each has its own rows, rank, batch size, learning rate,
schedule, clipping and end, and learns what it would learn alone.

What they share is the forward pass of the frozen base: a batch holds the rows of all, and each linear layer adds to a
row the update of that row's own adapter. Gradients of one adapter never depend on another's rows, so a training may
join or leave between any two steps. As in mLoRA (Ye et al. 2023, https://arxiv.org/abs/2312.02515) and S-LoRA (Sheng
et al. 2023, https://arxiv.org/abs/2311.03285), where batches of many adapters are answered.
"""
