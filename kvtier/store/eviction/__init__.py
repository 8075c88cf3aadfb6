"""Which block is evicted first: pure decisions, no I/O."""
