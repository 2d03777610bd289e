"""Evaluation: measures of a policy, their statistics, and `prefloop evaluate`."""
