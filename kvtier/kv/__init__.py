"""K and V in memory: shapes, pages, and buffers that a model appends to. Independent of models, files and policies."""
