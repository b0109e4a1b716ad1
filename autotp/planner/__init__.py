"""Makes a plan from a graph: which dims are sharded, where conversions stand, and the proof that the ranks compute the same."""
