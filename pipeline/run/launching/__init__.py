"""The processes that run the instances of a stage, and what each of them does."""
