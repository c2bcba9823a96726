"""Models: new ones, loading, tokenising rows, tuners, likelihood. Importing the package loads no torch."""
