"""Logits whose vocabulary stays in parts: each rank holds those of its tokens until something asks for all of them."""
