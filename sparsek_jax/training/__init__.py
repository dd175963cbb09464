"""Training: configuration, loss, optimizer, sharding, checkpoints and the loop."""
