"""Transformer-like models as values, and the text of each."""
