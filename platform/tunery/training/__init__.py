"""Training on Ray Train with DeepSpeed: TRL trainers, PPO, and packed LoRA trials."""
