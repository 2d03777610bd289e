"""Numbers and pairs into something to look at."""
