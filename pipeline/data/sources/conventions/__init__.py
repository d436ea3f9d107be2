"""Conventions by which people name splits, folders, columns and files, and what is told of how a source was read."""
