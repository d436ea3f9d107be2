"""Ops of `augment` on many images at once on any device: colours, levels, filters, erasing."""
