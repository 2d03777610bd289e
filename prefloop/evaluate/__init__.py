"""Answers into numbers: one file a measure."""
