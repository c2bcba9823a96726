"""Models and tokenizers: loading, new models, encoding of rows, generation and likelihoods. Importing the package does
not import torch."""
