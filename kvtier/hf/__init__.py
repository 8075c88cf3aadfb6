"""TieredCache and its turns: the only folder, besides the command line, that imports transformers."""
