"""Reading: the blocks of a prefix are found, opened, and copied to their places."""
