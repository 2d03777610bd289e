"""Pairs into weights: pure losses and log-probabilities, models, and a method-blind trainer."""
