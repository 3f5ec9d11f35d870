"""What surrounds the training loop: logging, evaluation, checkpoints, plots."""
