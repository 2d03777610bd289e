"""Data: rows of files and of the hub as prompts, targets and labelled pairs; a run's pairs as files for other trainers."""
