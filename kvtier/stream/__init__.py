"""Within a call: which layers are hot, where cold pages go, and how they come back in time."""
