"""Benchmarks for lm-evaluation-harness; the YAML files work with its own command line too (--include_path)."""
