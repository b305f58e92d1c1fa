"""What trained models learned, read from their checkpoints."""
