"""Training: losses and log-probabilities as pure functions, weight placement, and trainers that know no method."""
