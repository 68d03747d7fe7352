"""Scales, error correction and lattices: pure functions from tensors to tensors."""
