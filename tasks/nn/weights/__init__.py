"""Weights that exist already: files and tags of others, and what of them fits an encoder."""
