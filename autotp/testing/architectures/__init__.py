"""Holds transformer-like models as values, and writes the text of each."""
