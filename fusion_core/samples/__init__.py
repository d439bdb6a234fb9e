"""Example sites and tensors, on both sides of each requirement."""
