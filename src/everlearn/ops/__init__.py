"""Pure tensor functions: the delta rule, Newton-Schulz, and the update rules of memories and optimisers."""
