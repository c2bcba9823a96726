"""Proximal policy optimization for language models, on DeepSpeed in Ray Train workers.

Read in this order: kl.py, advantages.py and losses.py (the maths, pure functions), rollouts.py (a batch of rollouts and
its distribution over workers), models.py (policy, value, reference and reward model, on one shared base or separate),
trainer.py (one step), ppo_worker.py (the training loop).

Implementation details follow Huang et al. 2023, "The N Implementation Details of RLHF with PPO"
(https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo); comments mark the differences.
"""
