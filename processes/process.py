"""One process of a group: its output, its signals, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from processes.rank import ENDED

TIMEOUT_S = 60.0
# How long the output of a process that has ended may still come.
_DRAIN_S = 10.0
# No more output is on its way if none has come for so long.
_SETTLED_S = 0.3


class LaunchError(AssertionError):
    """A rank failed, or did not end in time; the text has the output of all."""


class Log:
    """What all ranks wrote, line by line in order of arrival; a rank's end is news, too."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.news = threading.Condition()

    def add(self, rank: int, line: str) -> None:
        with self.news:
            self.lines.append((rank, line))
            self.news.notify_all()

    def of(self, rank: int) -> str:
        with self.news:
            return "\n".join(line for who, line in self.lines if who == rank)

    def settled(self, rank: int) -> str:
        """What `rank` wrote, once nothing more of it has arrived for a while."""
        before, now = None, self.of(rank)
        while now != before:
            time.sleep(_SETTLED_S)
            before, now = now, self.of(rank)
        return now

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        with self.news:
            return self.news.wait_for(condition, seconds)


class Rank:
    """One process of a group."""

    def __init__(self, number: int, log: Log, command: list[str], env: dict[str, str]) -> None:
        self.number = number
        self.status: int | None = None
        self._log = log
        # A session, and so a process group, of its own: what the rank starts can be ended with it.
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._may_be_reaped = threading.Event()
        self._may_be_reaped.set()
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._reap)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_written(self, text: str) -> bool:
        with self._log.news:
            return any(who == self.number and text in line for who, line in self._log.lines)

    def wait_for(self, text: str, seconds: float = TIMEOUT_S) -> None:
        """Returns when the rank has written a line that contains `text`, now or before.

        Raises:
          LaunchError: if its program or the time ends before that.
        """
        has_ended = lambda: self.status is not None or self.has_written(ENDED)  # noqa: E731
        self._log.wait(lambda: self.has_written(text) or has_ended(), seconds)
        if not self.has_written(text):
            state = f"ended ({self.status})" if has_ended() else f"ran for {seconds:g} s"
            raise LaunchError(f"rank {self.number} {state} and did not write {text!r}")

    def resume(self) -> None:
        """Ends a `rank.pause`."""
        self._say(b" ")

    def kill(self) -> None:
        """SIGKILL; returns when the process is reaped, so that nobody takes it for alive."""
        self._may_be_reaped.set()
        self._signal(signal.SIGKILL)
        self._threads[1].join()

    def kill_unreaped(self) -> None:
        """Sends SIGKILL and leaves the process unreaped, as a busy launcher does, until `kill`."""
        self._may_be_reaped.clear()
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def write_stacks(self) -> None:
        """Makes the process, also a stopped one, write where its Python threads are."""
        self.go_on()
        self._signal(signal.SIGUSR1)

    def leave(self, well: bool) -> None:
        """Lets a rank whose program has ended leave: after JAX's shutdown, or at once."""
        self._say(b"\n" if well else b"!")

    def end(self) -> None:
        """Ends the process, and waits for the last of its output."""
        self.kill()
        self._threads[0].join(_DRAIN_S)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _say(self, byte: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # The process has ended meanwhile.
            os.write(self._process.stdin.fileno(), byte)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _read(self) -> None:
        for line in self._process.stdout:
            self._log.add(self.number, line.decode(errors="replace").rstrip("\n"))

    def _reap(self) -> None:
        # No other process gets this number, or a group of this number, before this one is reaped.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._may_be_reaped.wait()
        status = self._process.wait()
        with self._log.news:
            self.status = status
            self._log.news.notify_all()
