"""Reads JSON that another process wrote, and checks the shapes of its values."""
