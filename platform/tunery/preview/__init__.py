"""`tunery preview`: rows of a stage as its model gets them."""
