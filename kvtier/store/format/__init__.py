"""Bytes of blocks: safetensors files, codecs, and archives. Reads what anybody may have written."""
