"""What runs in each process of `launcher`: starts JAX, then the program.

The launcher runs `python -m processes.rank SPEC RESULT`. Programs import this module for `announce`
and `pause`, which tell a test where a rank is.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import importlib
import os
import pathlib
import pickle
import runpy
import signal
import sys
import traceback
from typing import Any

# The environment that tells a process of JAX its place; the first is JAX's own.
ADDRESS, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
ENDED = "the program has ended"
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to run.

    Attributes:
      kind: "function", "script" or "module".
      target: "module:function", a path, or a module's name.
      args: of the function, or the command line of a script or a module.
      distributed: what `jax.distributed.initialize` gets besides the place; None: it is not called.
      launcher: the process that ends this one when it dies.
    """

    kind: str
    target: str
    args: tuple[Any, ...]
    distributed: dict[str, Any] | None
    launcher: int


def number() -> int:
    """The number of this process in the group."""
    return int(os.environ[PROCESS_ID])


def announce(what: str) -> None:
    """Tells the launcher that this rank has come this far: `Rank.wait_for(what)` returns."""
    # One call, which no other thread's output can split, on a line of its own.
    os.write(1, f"\n{what}\n".encode())


def pause(what: str) -> None:
    """Announces `what` and waits for `Rank.resume`. Other threads of the process go on."""
    announce(what)
    if not os.read(0, 1):
        raise EOFError(f"{what}: the launcher has gone")


def main() -> None:
    faulthandler.enable()
    # A copy of stderr, because pytest takes stderr itself while a test runs.
    faulthandler.register(signal.SIGUSR1, os.dup(2), all_threads=True)
    spec_path, result_path = map(pathlib.Path, sys.argv[1:])
    spec: Spec = pickle.loads(spec_path.read_bytes())
    _die_with(spec.launcher)
    result, status = None, 0
    try:
        result = _run(spec)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    if status == 0:
        result_path.write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # If all ranks have ended well, each shuts JAX down as any program does. The shutdown waits for
    # every rank, so if one has died, the others leave without it.
    announce(ENDED)
    if os.read(0, 1) != b"\n":
        os._exit(status)
    sys.exit(status)


def _die_with(launcher: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)


def _run(spec: Spec) -> Any:
    if spec.distributed is not None:
        import jax

        jax.distributed.initialize(
            os.environ[ADDRESS], int(os.environ[NUM_PROCESSES]), number(), **spec.distributed
        )
    if spec.kind == "function":
        module, name = spec.target.split(":")
        return getattr(importlib.import_module(module), name)(*spec.args)
    sys.argv[1:] = map(str, spec.args)
    if spec.kind == "module":
        runpy.run_module(spec.target, run_name="__main__", alter_sys=True)
        return None
    sys.argv[0] = spec.target
    sys.path.insert(0, str(pathlib.Path(spec.target).parent))
    runpy.run_path(spec.target, run_name="__main__")
    return None


if __name__ == "__main__":
    main()
