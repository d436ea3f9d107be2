"""Images on disk and in batches: stores, splits, the order of batches, and their stream. No module here imports torch."""
