"""Train several LoRA adapters on one copy of their base model.

Each training has its own rows, rank, batch size, learning rate, schedule, clipping and number of steps, and gives the
same result as outside a pack.

The trainings share the forward pass of the frozen base: a batch contains rows of all of them, and each linear layer
adds to a row the output of the row's own adapter. The gradients of an adapter never depend on the rows of another, so a
training can join or leave the pack between any two steps. Similar: mLoRA (Ye et al. 2023,
https://arxiv.org/abs/2312.02515) for training, S-LoRA (Sheng et al. 2023, https://arxiv.org/abs/2311.03285) for
inference.
"""
