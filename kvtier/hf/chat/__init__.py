"""Conversations on a TieredCache: messages, the tokens that stand for them, and their saved form."""
