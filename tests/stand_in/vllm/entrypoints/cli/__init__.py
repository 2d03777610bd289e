"""A stand-in for vLLM; see entrypoints/cli/main.py."""
