"""Runs the forwards of modules under a plan."""
