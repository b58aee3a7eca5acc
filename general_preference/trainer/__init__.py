"""How it learns: arguments, the DeepSpeed strategy, the training loop, checkpoints, metrics and pictures."""
