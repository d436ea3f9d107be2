"""Scores of a table by arm, and its verdicts in sentences."""
