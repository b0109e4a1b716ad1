"""Keeps plans on disk: what a plan depends on, as a key, and the folder that it is kept in under it."""
