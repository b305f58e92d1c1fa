"""What training has made of a model's weights and hidden states: the paper's figures 6 and 7, and more."""
