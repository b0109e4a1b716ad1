"""Operator calls inside the forward of a module: where one looks across a sharded dim, a distributed form runs."""
