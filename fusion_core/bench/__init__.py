"""Compiles a model with and without fusion_core and times both side by side, for ``fusion-core bench``."""
