"""One turn: what it reuses, what happens to its rows, and what it keeps."""
