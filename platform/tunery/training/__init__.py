"""Training on Ray Train: launch, DeepSpeed's configuration, and TRL's trainers in the workers."""
