"""Bytes of blocks: safetensors files, codecs, and archives. Files from any writer can be read safely."""
