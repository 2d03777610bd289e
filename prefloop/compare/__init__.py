"""`prefloop compare`: variants of a recipe with several seeds each, run together, in one table."""
