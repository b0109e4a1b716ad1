"""Serves a parallel model: rank 0 takes requests, and the other ranks carry them out with it."""
