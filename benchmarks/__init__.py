"""Benchmarks of kvtier on a small real model. ``benchmarks/README.md`` says what they measure and how to read them."""
