"""Train several LoRA adapters on one copy of their base model.

Each training has its own rows, rank, batch size, learning rate, schedule, clipping and number of steps, and learns what
it would learn alone.

The trainings share the forward pass of the frozen base: a batch holds the rows of all of them, and each linear layer
adds to a row the output of that row's own adapter. Gradients of one adapter never depend on the rows of another, so a
training can join or leave the pack between any two steps. As in mLoRA (Ye et al. 2023,
https://arxiv.org/abs/2312.02515) and S-LoRA (Sheng et al. 2023, https://arxiv.org/abs/2311.03285, inference).
"""
