"""Images on disk and in batches: stores, splits, the order of batches, and their loading. No module imports torch."""
