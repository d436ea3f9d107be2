"""The parts of the stage `pretrain`."""
