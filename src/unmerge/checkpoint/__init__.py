"""Checkpoints and adapters on disk or on the Hub: named tensors, read a block of rows at a time."""
