"""The hall: the only code that imports transformers."""
