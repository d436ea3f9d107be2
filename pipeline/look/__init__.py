"""A look at a folder of images before anything is trained: `firstlight look`."""
