"""From a target and scales to codes."""
