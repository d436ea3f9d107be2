"""Images with their channels as they are (`dataset.channels`): any number of them, of 8 or 16 bits."""
