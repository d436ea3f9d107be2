"""Rows of tables: what their formats share, and Hugging Face data sets."""
