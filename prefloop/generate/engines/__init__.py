"""Engines that recipes can name, one file each; the contract is prefloop/generate/engine.py."""
