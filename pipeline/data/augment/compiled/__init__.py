"""Augmentations compiled to machine code: the pixels of Pillow, bit by bit, in a third of its time or less."""
