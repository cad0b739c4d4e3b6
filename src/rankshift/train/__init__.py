"""Training with transformers: the Trainer, data, evaluation, recipes. The only floor that imports transformers."""
