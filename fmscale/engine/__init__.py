"""What makes it big: DeepSpeed ZeRO, the optimizer with its averaged weights, checkpoints, metrics."""
