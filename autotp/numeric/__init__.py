"""Checks the numbers of a plan: the model and its local ranks run in one process, and are compared."""
