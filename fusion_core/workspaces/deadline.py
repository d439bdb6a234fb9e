"""A time limit for code of other libraries."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")


class TooLate(Exception):
    """The work did not end in time."""


def within(seconds: float, work: Callable[[], T], late: Callable[[T], Any]) -> T:
    """Run ``work`` on a new thread, and return or raise what it does. After the time limit the thread runs on.

    Args:
        seconds: How long to wait.
        work: The function to run.
        late: Called with the result of ``work`` if it returns after the limit.

    Raises:
        TooLate: if ``work`` does not end in time.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            if not future.cancelled():
                future.set_exception(error)
            return
        try:
            future.set_result(found)
        except InvalidStateError:
            late(found)

    # a daemon, so that the process can exit while late work still runs
    threading.Thread(target=run, name="fusion_core deadline", daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        if future.done() or not future.cancel():  # it ended just now, or raised this error itself
            return future.result()
        raise TooLate from None
