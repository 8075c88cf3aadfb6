"""Arguments of a call as token rows: ids, padding, images, sounds, embeddings, positions."""
