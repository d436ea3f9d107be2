"""One training on one worker: the loop, checkpoints, metrics and the feature monitor."""
