"""Decides which modules of experts are dealt whole over the ranks, and proves each by numbers."""
