"""Models: scratch models, loading, tokenization, adapters, likelihoods. Importing the package does not import torch."""
