"""The sections of the kinds of stages, apart from what the stages do: a recipe is checked without torch."""
