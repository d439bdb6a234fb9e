"""A pool of processes that are the ranks of one group."""

from fusion_core.workers.pool import WorkerError, WorkerPool

__all__ = ["WorkerError", "WorkerPool"]
