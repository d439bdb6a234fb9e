"""What torch makes of a value that is rounded and widened again at once, before the pass sees the graph."""

import torch

KEPT = torch.__version__ >= (2, 13)
"""Whether it keeps both casts. Earlier ones remove them, so that the graph says nothing of the rounding."""
SAID_BY_CASTS = frozenset({"norm_dtype", "residual_dtype", "weight_after_cast", "norm_of_unrounded_sum"})
"""Attributes of a site that say where the model rounds."""
