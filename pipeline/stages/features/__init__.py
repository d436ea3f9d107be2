"""Features of images: computed, searched, laid on a plane."""
