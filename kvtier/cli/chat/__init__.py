"""``kvtier chat``, a conversation in the terminal, and ``kvtier warm``, which computes a document for it."""
