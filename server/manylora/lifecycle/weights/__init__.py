"""What is done to the weights of adapters."""
