"""The device that the corpus runs on: ``TEST_DEVICE=cuda`` puts the same rows on a GPU."""

import os

import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
BACKEND = "nccl" if DEVICE.type == "cuda" else "gloo"
