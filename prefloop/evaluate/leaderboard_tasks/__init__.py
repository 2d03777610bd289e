"""Task files for lm-evaluation-harness; they work with its own command line too (--include_path)."""
