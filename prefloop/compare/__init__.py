"""Comparisons: the same recipe with variations, several seeds each, played as one and tabled together."""
