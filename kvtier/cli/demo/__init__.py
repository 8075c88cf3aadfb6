"""``kvtier demo``: a conversation about a long document, in three turns and two processes."""
