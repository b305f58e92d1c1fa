"""What a trained model is worth: lm-eval's tasks, losses on token files, and the paper's tables."""
