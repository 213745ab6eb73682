"""Starts the processes of a group under `jax.distributed.initialize`, and leaves none behind.

    results = launcher.run(function, 1, "two", num_processes=2, num_devices=4)

    with launcher.start(function, num_processes=2) as group:
        group[1].wait_for("sent")   # what the function said by rank.announce or rank.pause
        group[1].kill()
        ended = group.wait()        # exit status, output and result of each rank

When something goes wrong, the error shows what every rank wrote, and where those that still ran
were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import pickle
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

from processes import rank as rank_lib
from processes.process import TIMEOUT_S, LaunchError, Log, Rank

ROOT = pathlib.Path(__file__).parents[1]
# How long the other ranks may still run after one has failed. It may have told them of its fault.
GRACE_S = 10.0
# How long a process may take to begin to write its stacks, and then to end.
_STACKS_S, _REST_OF_STACKS_S = 10.0, 0.5
# What is in the heading of each stack.
_STACK = "(most recent call first)"
_LOWEST_PORT = 1 << 13
_GIVEN_PORTS = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")
NO_OPTIONS: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Host:
    """Where a rank runs: `prefix` is put before its command, `address` is where others reach it."""

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status (minus the signal that killed it), output and result."""

    status: int
    output: str
    result: Any


class Group(Sequence[Rank]):
    """The processes that `start` started; leaving the context ends those that still run."""

    def __init__(self, folder: pathlib.Path, timeout_s: float) -> None:
        self.ranks: list[Rank] = []
        self.log = Log()
        self._folder = folder
        self._deadline = time.monotonic() + timeout_s
        self._is_shown = False

    def __getitem__(self, index: Any) -> Any:
        return self.ranks[index]

    def __len__(self) -> int:
        return len(self.ranks)

    def output(self) -> str:
        """What all wrote, each line with its rank, and how they ended."""
        with self.log.news:
            lines = [f"[{who}] {line}" for who, line in self.log.lines if line]
        states = ["running" if r.status is None else str(r.status) for r in self.ranks]
        return "\n".join([*lines, f"exit status by rank: {', '.join(states)}"])

    def wait(self, shutdown: bool = True) -> list[Ended]:
        """Waits until every rank has ended, well or not.

        Args:
          shutdown: whether the ranks shut JAX down, if all have ended well. It needs all of them.

        Raises:
          LaunchError: if the time is over; ranks that still run write their stacks and are killed.
        """
        if not self._wait(lambda: all(self._is_done(r) for r in self.ranks)):
            self._give_up()
        well = shutdown and not any(self._has_failed(r) for r in self.ranks)
        for r in self.ranks:
            r.leave(well)
        if not self._wait(lambda: all(r.status is not None for r in self.ranks)):
            self._give_up()
        self._end()
        return [Ended(r.status or 0, self.log.of(r.number), self._result(r)) for r in self.ranks]

    def results(self, shutdown: bool = True) -> list[Any]:
        """What the ranks return; `shutdown` as in `wait`.

        Raises:
          LaunchError: if one failed, or did not end in time.
        """
        failed = lambda: any(self._has_failed(r) for r in self.ranks)  # noqa: E731
        self._wait(lambda: failed() or all(self._is_done(r) for r in self.ranks))
        if failed():
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
        ended = self.wait(shutdown)
        if any(end.status for end in ended):
            self._is_shown = True
            raise LaunchError(f"a rank failed\n{self.output()}")
        return [end.result for end in ended]

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, traceback
        if error is not None and not self._is_shown:
            self._write_stacks()
            error.add_note(self.output())
        self._end()

    def _wait(self, condition: Callable[[], bool]) -> bool:
        return self.log.wait(condition, max(0.0, self._deadline - time.monotonic()))

    def _is_done(self, rank: Rank) -> bool:
        return rank.status is not None or rank.has_written(rank_lib.ENDED)

    def _has_failed(self, rank: Rank) -> bool:
        return self._is_done(rank) and not self._result_path(rank).exists()

    def _result_path(self, rank: Rank) -> pathlib.Path:
        return self._folder / f"result{rank.number}"

    def _result(self, rank: Rank) -> Any:
        path = self._result_path(rank)
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def _write_stacks(self) -> None:
        running = [r for r in self.ranks if not self._is_done(r)]
        if not running:
            return
        for r in running:
            r.write_stacks()
        self.log.wait(
            lambda: all(self._is_done(r) or r.has_written(_STACK) for r in running), _STACKS_S
        )
        self.log.wait(lambda: False, _REST_OF_STACKS_S)

    def _give_up(self) -> NoReturn:
        late = [r.number for r in self.ranks if not self._is_done(r)]
        for r in self.ranks:
            if self._is_done(r):
                r.leave(well=False)
        self._write_stacks()
        self._end()
        self._is_shown = True
        raise LaunchError(f"ranks {late} did not end in time\n{self.output()}")

    def _end(self) -> None:
        for r in self.ranks:
            r.end()


def free_port() -> int:
    """A port that nobody uses, and that the kernel gives to no program that asks for any port.

    A program that opens a connection asks for any port, and could get this one before a rank does.
    """
    lowest, highest = map(int, _GIVEN_PORTS.read_text().split())
    ports = range(_LOWEST_PORT, 1 << 16)
    kept = [port for port in ports if not lowest <= port <= highest]
    while True:
        port = random.choice(kept or ports)
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("", port))
            return port


@contextlib.contextmanager
def start(
    target: Callable[..., Any] | pathlib.Path | str,
    *args: Any,
    num_processes: int,
    num_devices: int = 1,
    timeout_s: float = TIMEOUT_S,
    distributed: dict[str, Any] | None = NO_OPTIONS,
    env: dict[str, str] | None = None,
    hosts: Sequence[Host] = (Host(),),
    port: int | None = None,
    gpus: str = "CUDA_VISIBLE_DEVICES",
    num_gpus: int | None = None,
) -> Iterator[Group]:
    """Starts a group of processes; at the end of the context none of them is left.

    Args:
      target: a function at the top of a module that can be imported, a script, or the name of a
        module to run.
      *args: of the function, to be pickled, or the words behind the script or the module.
      num_processes: one rank of `jax.distributed` each.
      num_devices: CPU devices of each; on GPUs (JAX_PLATFORMS=cuda) each process has one, its own.
      timeout_s: of the whole group.
      distributed: what `jax.distributed.initialize` gets besides the place; None leaves the call
        to the program, which finds its place in the environment that `rank` names.
      env: variables beyond those of this process.
      hosts: where rank i runs: hosts[i % len(hosts)]. The coordinator is on the first.
      port: of the coordinator; None for a free one.
      gpus: the variable that gives a process its GPU, CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS.
      num_gpus: GPUs that there are; if they are fewer than the processes, several have the same.
    """
    address = f"{hosts[0].address}:{port or free_port()}"
    spec = _make_spec(target, args, distributed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "spec").write_bytes(pickle.dumps(spec))
        with Group(folder, timeout_s) as group:
            for number in range(num_processes):
                command = [*hosts[number % len(hosts)].prefix, sys.executable, "-u"]
                command += ["-m", rank_lib.__name__]
                command += [str(folder / "spec"), str(folder / f"result{number}")]
                place = _place(number, num_processes, num_devices, address, gpus, num_gpus)
                group.ranks.append(Rank(number, group.log, command, {**place, **(env or {})}))
            yield group


def run(target: Callable[..., Any] | pathlib.Path | str, *args: Any, **options: Any) -> list[Any]:
    """Starts a group as `start` does, and returns what its ranks return (`Group.results`)."""
    with start(target, *args, **options) as group:
        return group.results()


def _make_spec(target: Any, args: tuple[Any, ...], distributed: Any) -> rank_lib.Spec:
    kind = "script" if isinstance(target, pathlib.Path) else "module"
    if callable(target):
        kind = "function"
        target = f"{target.__module__}:{target.__qualname__}"
    return rank_lib.Spec(kind, str(target), args, distributed, os.getpid())


def _place(
    number: int,
    num_processes: int,
    num_devices: int,
    address: str,
    gpus: str,
    num_gpus: int | None,
) -> dict[str, str]:
    """The environment of a rank."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env["XLA_FLAGS"] = _DEVICE_COUNT.sub("", env.get("XLA_FLAGS", ""))
    env["JAX_NUM_CPU_DEVICES"] = str(num_devices)
    env["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    env[rank_lib.ADDRESS] = address
    env[rank_lib.NUM_PROCESSES] = str(num_processes)
    env[rank_lib.PROCESS_ID] = str(number)
    if "cuda" in env.get("JAX_PLATFORMS", ""):
        env[gpus] = str(number % (num_gpus or num_processes))
        if num_gpus is not None and num_gpus < num_processes:
            env["JAX_SM_FREE_SHARED_GPUS"] = "1"
            env["NCCL_HOSTID"] = str(number)  # NCCL refuses two processes of one host on one GPU.
    return env
