"""The first screen of a report: whether it helped, by how much, against what, and what to do next."""
