"""What the owner of a store does between turns: names, removal, statistics."""
