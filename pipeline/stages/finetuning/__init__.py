"""The parts of the stage `finetune`."""
