"""Blocks as files of one folder, which several processes share."""
