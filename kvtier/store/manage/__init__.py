"""Management of a store between turns: names, removal, statistics."""
