"""Model → root: a hash of everything besides tokens that decides K and V."""
