"""A checkpoint as a Model: where its files are, its weights, text encoders, noise schedule and autoencoder."""
