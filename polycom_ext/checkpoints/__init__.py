"""What checkpoints hold, read without their trainer and without running code from them."""
