"""Every causal language model of the installed transformers, made tiny and run with kvtier: see README.md."""
