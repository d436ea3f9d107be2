"""Images and views that a worker keeps decoded: how much of them, and those outside of trainings."""
