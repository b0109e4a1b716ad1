"""Sequence parallelism: between regions each rank holds its slice of the tokens, until something asks for all of them."""
