"""Makes small example inputs for every path that a user of a model runs."""
