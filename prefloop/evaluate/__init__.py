"""Answers into numbers: one file a measure. Called, `prefloop.evaluate(run)`, it measures: prefloop/api.py."""
