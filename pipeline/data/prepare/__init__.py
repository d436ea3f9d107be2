"""The stage `prepare`: any source of images becomes a store, resumable and extendable."""
