"""The known prefix of a turn, loaded into the layers of a cache."""
