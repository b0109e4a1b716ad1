"""Plan × mesh → a model whose parameters are DTensors and whose modules run on local tensors."""
