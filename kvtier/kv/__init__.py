"""K and V in memory: shapes, pages, and the buffers that a model appends to. Knows no model, file or policy."""
