"""Copies ahead, fused updates and utilisation: what a training does on a GPU beyond what it does on a CPU."""
