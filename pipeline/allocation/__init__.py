"""Mixed precision: which type each matrix gets under a budget of bytes."""
