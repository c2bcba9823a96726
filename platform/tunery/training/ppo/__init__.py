"""Proximal policy optimization for language models, on DeepSpeed in Ray Train workers.

Read in this order: kl.py, advantages.py and losses.py (the maths, pure functions), rollouts.py (a batch of answers and
how workers share it), models.py (policy, value, reference and reward model, on one base or each for itself),
trainer.py (a step), worker.py (a training).

Implementation details follow Huang et al. 2023, "The N Implementation Details of RLHF with PPO"
(https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo); where ours differ, the place says so.
"""
