"""Saved networks and tables, which stages hand on to each other."""
