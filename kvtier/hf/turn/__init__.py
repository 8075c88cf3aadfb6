"""One turn: the prefix it reuses, its row moves, and the tokens it keeps."""
