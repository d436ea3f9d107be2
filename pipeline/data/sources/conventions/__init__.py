"""Conventions by which people name splits, folders, columns and files, and notes on how a source was read."""
