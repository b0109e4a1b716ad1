"""Runs the collectives of a rewritten model, and the conversions between placements."""
