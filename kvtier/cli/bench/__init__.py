"""``kvtier bench``: time to the first token on this machine, from every place K and V can come from."""
