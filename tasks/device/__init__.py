"""Work on the device of a training: copies to it, and the time of the parts of a step."""
