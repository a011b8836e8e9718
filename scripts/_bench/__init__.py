"""What ``scripts/bench`` is made of: one module for each figure, and what they share."""
