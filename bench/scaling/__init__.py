"""Estimates of the traffic, memory and time of a training of n images on w workers: `python -m bench.scaling`.

The numbers are derived from the code that trainings run.
"""
