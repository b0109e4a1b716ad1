"""One rule an operator: which dims are one axis, what is summed over, what stays whole."""
