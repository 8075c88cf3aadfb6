"""Pictures of the documentation, drawn by code: ``python -m docs.pictures`` writes them into ``docs/images``."""
