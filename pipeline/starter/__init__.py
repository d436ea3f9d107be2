"""A recipe for images that nobody has described yet: what they are, what suits them, and the file that says so."""
