"""Model → root: everything besides tokens that must be equal for K and V to be equal."""
