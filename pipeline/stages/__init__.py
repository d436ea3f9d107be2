"""What a recipe can do: one file for each kind of stage."""
