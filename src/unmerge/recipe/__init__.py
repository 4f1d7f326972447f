"""Merge recipes: read, resolved tensor by tensor, made again, and compared with the weights that they speak of."""
