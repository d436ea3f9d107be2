"""Named augmentations as pure functions of an image and of (seed, pass, id, view)."""
