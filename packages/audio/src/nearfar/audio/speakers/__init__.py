"""Who speaks: embeddings, training, verification."""
