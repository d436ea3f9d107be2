"""The parts of the stage `export`."""
