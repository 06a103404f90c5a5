"""What a run tells: files first, then console and Weights & Biases as readers of the same facts."""
