"""Models: policies and their adapters, chat templates, sentence embeddings, heads of reward models."""
