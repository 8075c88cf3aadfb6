"""Arguments of a call → token rows: ids, padding, images, sounds, embeddings, positions."""
