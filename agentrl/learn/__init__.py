"""Learning: score a batch, compute a loss and its gradient, and update the weights of the policy."""
