"""Ray Tune: trials of a recipe, judged on held-out images."""
