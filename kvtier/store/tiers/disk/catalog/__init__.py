"""The SQLite file of a folder: rows of blocks, their states, and their values to an eviction policy."""
