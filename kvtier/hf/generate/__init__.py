"""generate() with a TieredCache: wrapped, run as a turn, and its prompt prefilled in chunks."""
