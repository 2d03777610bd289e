"""Evaluation: measures of a policy, their statistics, and `prefloop evaluate`. Called, `prefloop.evaluate(run)` measures."""
