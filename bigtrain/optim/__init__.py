"""What updates the weights: parameter groups, the update rule, and the learning rate as a function of the step."""
