"""Small sets of images that come with a package, for demos and tests."""
