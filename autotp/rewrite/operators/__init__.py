"""Changes operator calls inside the forward of a module: an operator that looks across a sharded dim runs in its distributed form."""
