"""Any source of images becomes a store, in jobs that can be resumed, and a store can be extended."""
