"""What a backend declares, and how it is loaded."""
