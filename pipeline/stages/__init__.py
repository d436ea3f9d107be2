"""The kinds of stages of a recipe, one file for each."""
