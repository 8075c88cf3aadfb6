"""Blocks in RAM."""
