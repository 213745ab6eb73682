"""Ends a process that hangs, because a collective that waits for ever cannot be interrupted."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deadline(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Calls `give_up` and ends the process with status 1 if the body takes longer than `seconds`.

    `give_up` runs on a thread of its own and saves what there is.
    """

    def end() -> None:
        try:
            give_up()
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
