from fusion_core.testing.conformance import *  # noqa: F403

BACKEND = "shm"
