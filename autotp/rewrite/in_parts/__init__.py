"""Tensors of the whole shape of which each rank holds a part: what no operator on parts is known for gets the whole tensor."""
