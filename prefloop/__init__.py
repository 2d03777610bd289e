"""Closed-loop self-alignment of language models, without human preference labels."""

__version__ = "0.1.0"
