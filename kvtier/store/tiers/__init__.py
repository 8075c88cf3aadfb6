"""Tiers: places for blocks, the fastest first."""
