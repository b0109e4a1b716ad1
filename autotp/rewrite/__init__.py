"""Rewrites a model by a plan over a mesh: parameters become DTensors, and modules run on local tensors."""
