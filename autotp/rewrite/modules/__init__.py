"""Forwards of modules under a plan."""
