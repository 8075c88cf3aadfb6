"""Places where blocks are kept, the fastest first."""
