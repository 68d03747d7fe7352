"""The hot loops in plain PyTorch, vectorised over rows: the oracle of the compiled forms."""
