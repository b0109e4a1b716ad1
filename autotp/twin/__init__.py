"""Builds a small model that stands for a large one of transformers."""
