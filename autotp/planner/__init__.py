"""Graph → Plan: which dims are cut, where conversions stand, and the proof that it computes the same."""
