"""What ranks run in the tests of buffers over several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import support

import jax_sm_free as smf
from processes import rank, together

TIMEOUT_S = 3.0  # of tests in which it passes
MARGIN_S = 8.0  # so much later may an error come, on a busy machine
LONG_S = 60.0  # of tests in which it does not
AT_ONCE_S = LONG_S / 2
TOKENS, HIDDEN, TOP_K = 5, 6, 2
# Where a process may be made to act in `layer_of`.
PLACES = ("before_send", "between", "before_combine")


def mesh_of(processes: int | None = None) -> jax.sharding.Mesh:
    """All devices, or those of the first processes."""
    devices = [d for d in jax.devices() if processes is None or d.process_index < processes]
    return jax.sharding.Mesh(np.array(devices), ("ep",))


def open_buffer(mesh: jax.sharding.Mesh, **sizes: Any) -> smf.Buffer:
    defaults = {
        "hidden": HIDDEN,
        "num_experts": mesh.size,
        "top_k": TOP_K,
        "max_tokens": TOKENS,
        # Also where all tokens name one expert twice.
        "recv_capacity": mesh.shape["ep"] * TOKENS * TOP_K,
        "dtype": jnp.float32,
        "timeout_s": LONG_S,
    }
    return smf.Buffer(mesh, "ep", **(defaults | sizes))


def make_inputs(mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Any, ...]:
    """x, topk_idx, weights, as arrays over all processes."""
    rng = np.random.default_rng(seed)
    rows = mesh.size * TOKENS
    arrays = (
        rng.integers(-9, 9, (rows, HIDDEN)).astype(np.float32),
        rng.integers(0, mesh.shape["ep"], (rows, TOP_K)).astype(np.int32),
        rng.integers(1, 9, (rows, TOP_K)).astype(np.float32),
    )
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    return tuple(jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in arrays)


def on_ranks(mesh: jax.sharding.Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    spec = jax.P(mesh.axis_names)
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))


@dataclasses.dataclass
class Action:
    """What this process does at one place of a run, once."""

    place: str = ""
    do: Callable[[], None] = lambda: None

    def at(self, place: str) -> None:
        if place == self.place:
            self.place = ""
            self.do()


def layer_of(buffer: smf.Buffer, action: Action) -> Callable[..., Any]:
    """Every token to its experts, and the sum of what comes back: x * the sum of its weights."""

    def at(place: str, value: Any) -> Any:
        def on_host(value: Any) -> Any:
            action.at(place)
            return np.asarray(value)

        return jax.pure_callback(on_host, jax.typeof(value), value)

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        sent = buffer.dispatch_send(at("before_send", x), topk_idx, weights)
        between, sent = support.after(x, sent)
        _, sent = support.after(at("between", between), sent)
        recv = buffer.dispatch_recv(sent)
        return buffer.combine(at("before_combine", recv.x), recv.layout, weights=recv.weights)

    return layer


def layer_without_actions(buffer: smf.Buffer) -> Callable[..., Any]:
    """The same without callbacks."""

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        recv = buffer.dispatch(x, topk_idx, weights)
        return buffer.combine(recv.x, recv.layout, weights=recv.weights)

    return layer


def check(out: Any, inputs: tuple[Any, ...]) -> None:
    """Raises unless this process's part of the layer's result is right; the numbers are exact."""
    for got, x, _, weights in zip(*(a.addressable_shards for a in (out, *inputs)), strict=True):
        want = np.asarray(x.data) * np.asarray(weights.data).sum(1, keepdims=True)
        np.testing.assert_array_equal(np.asarray(got.data), want)


def run_well(run: Callable[..., Any], mesh: jax.sharding.Mesh, inputs: tuple[Any, ...]) -> None:
    """A good run that all processes begin together, and have ended when this returns."""
    together.compile_and_meet(run, mesh, *inputs)
    check(run(*inputs), inputs)
    together.meet(mesh)


def check_new_buffer(processes: int | None = None) -> None:
    """Opens a buffer over the first processes and runs the layer."""
    mesh = mesh_of(processes)
    with open_buffer(mesh) as buffer:
        inputs = make_inputs(mesh)
        check(on_ranks(mesh, layer_of(buffer, Action()))(*inputs), inputs)


def error_and_seconds(run: Callable[[], Any]) -> tuple[str, float]:
    """The error of a run that must fail, and how long it took."""
    start = time.monotonic()
    try:
        jax.block_until_ready(run())
    except Exception as error:
        return str(error), time.monotonic() - start
    raise AssertionError("expected the run to fail, but it gave a result")


# -------------------------------------------------------------------------- programs of the tests


def fail_once(
    how: str, place: str, survivors: int | None, timeout_s: float
) -> tuple[str, float, str]:
    """A good run, one in which the last process acts, and a good run on a new buffer.

    Args:
      how: "pause" where the test kills or stops that process; "raise", after which it pauses and
        then runs again, or "raise, go on", at once.
      place: of PLACES.
      survivors: processes that run on a new buffer afterwards; None for all.
      timeout_s: of the buffer.

    Returns:
      The error, the seconds it took, and what `check` raised.
    """
    mesh = mesh_of()
    buffer, inputs, action = open_buffer(mesh, timeout_s=timeout_s), make_inputs(mesh), Action()
    run = on_ranks(mesh, layer_of(buffer, action))
    run_well(run, mesh, inputs)
    if jax.process_index() == jax.process_count() - 1:
        action.place, action.do = place, lambda: act(how, place)
    error, seconds = error_and_seconds(lambda: run(*inputs))
    rank.announce("has failed")
    if how == "raise" and "process died" in error:
        rank.pause("has raised")
    again, _ = error_and_seconds(lambda: run(*inputs))
    kept = fault_of(buffer)
    assert kept in again or "process died" in error, (kept, again)
    buffer.close()
    if survivors is None or jax.process_index() < survivors:
        check_new_buffer(survivors)
    return error, seconds, kept


def act(how: str, place: str) -> None:
    if how.startswith("raise"):
        raise RuntimeError("this process died")
    rank.pause(place)


def fault_of(buffer: smf.Buffer) -> str:
    try:
        buffer.check()
    except smf.FaultError as fault:
        return str(fault)
    return ""


def stop_shortly() -> None:
    """The last process pauses before its send; the run goes on behind that."""
    mesh = mesh_of()
    with open_buffer(mesh) as buffer:
        inputs, action = make_inputs(mesh), Action()
        run = on_ranks(mesh, layer_of(buffer, action))
        check(run(*inputs), inputs)
        if jax.process_index() == jax.process_count() - 1:
            action.place, action.do = "before_send", lambda: rank.pause("before_send")
        check(run(*inputs), inputs)
        buffer.check()


def close_early() -> tuple[str, float]:
    """The last process closes its buffer when it has run once; the others run again."""
    mesh = mesh_of()
    buffer, inputs = open_buffer(mesh), make_inputs(mesh)
    run = on_ranks(mesh, layer_of(buffer, Action()))
    run_well(run, mesh, inputs)
    if jax.process_index() == jax.process_count() - 1:
        buffer.close()
        return "", 0.0
    return error_and_seconds(lambda: run(*inputs))


def end_one_of_two() -> tuple[str, str]:
    """Ends one buffer by closing it in the last process, the next by a timeout; another goes on.

    Returns:
      The errors of both; those of the first process, in all.
    """
    mesh = mesh_of()
    inputs = make_inputs(mesh)
    is_last = jax.process_index() == jax.process_count() - 1
    errors = []
    with open_buffer(mesh, timeout_s=TIMEOUT_S) as kept:  # of another timeout would not share
        run_kept = on_ranks(mesh, layer_of(kept, Action()))
        run_well(run_kept, mesh, inputs)
        for ending in ("close", "leave out"):
            with open_buffer(mesh, timeout_s=TIMEOUT_S) as buffer:
                run = on_ranks(mesh, layer_of(buffer, Action()))
                run_well(run, mesh, inputs)
                if is_last and ending == "close":
                    buffer.close()
                error = "" if is_last else error_and_seconds(lambda: run(*inputs))[0]  # noqa: B023
                errors.append(together.told_to_all(mesh, error)[0])
            for _ in range(3):
                check(run_kept(*inputs), inputs)
        kept.check()
    return errors[0], errors[1]


def open_differently(sizes_of_last: dict[str, Any]) -> str:
    """The last process opens a buffer of other sizes. Then all open one of the same."""
    mesh = mesh_of()
    sizes = sizes_of_last if jax.process_index() == jax.process_count() - 1 else {}
    try:
        open_buffer(mesh, **sizes)
    except ValueError as error:
        text = str(error)
    check_new_buffer()
    return text


def open_without_ucx() -> str:
    """The last process lacks the package. Then it has it."""
    if jax.process_index() == jax.process_count() - 1:
        sys.modules["libucx"] = None
    try:
        open_buffer(mesh_of())
    except (ImportError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    sys.modules.pop("libucx", None)
    check_new_buffer()
    return text


def run_differently(how: str) -> tuple[str, float]:
    """The last process runs another program than the others, as their second run."""
    mesh = mesh_of()
    inputs = make_inputs(mesh)
    buffer = open_buffer(mesh, num_slots=3)
    layer = layer_of(buffer, Action())
    run_well(on_ranks(mesh, layer), mesh, inputs)

    def ours(x: Any, topk_idx: Any, weights: Any) -> Any:
        return layer(x, topk_idx, weights)

    def theirs(x: Any, topk_idx: Any, weights: Any) -> Any:
        return layer(x, topk_idx, weights)

    def fewer(x: Any, topk_idx: Any, weights: Any) -> Any:
        return layer(x[1:], topk_idx[1:], weights[1:])

    def twice(x: Any, topk_idx: Any, weights: Any) -> Any:
        inner = jax.jit(layer)
        return inner(inner(x, topk_idx, weights), topk_idx, weights)

    fewer.__name__ = twice.__name__ = "ours"
    is_last = jax.process_index() == jax.process_count() - 1
    other = {"name": theirs, "shape": fewer, "copies": twice}[how]
    run = on_ranks(mesh, other if is_last else ours)
    result = error_and_seconds(lambda: run(*inputs))
    buffer.close()
    check_new_buffer()
    return result


def run_after_others_were_compiled() -> None:
    """The first process compiles programs equal to those that all run, but does not run them."""
    mesh = mesh_of()
    inputs = make_inputs(mesh)
    kept = []
    with open_buffer(mesh) as buffer:
        for _ in range(3):
            layer = layer_of(buffer, Action())
            if jax.process_index() == 0:
                kept += [on_ranks(mesh, layer).lower(*inputs).compile() for _ in range(2)]
            pending = [on_ranks(mesh, layer)(*inputs) for _ in range(3)]
            for out in pending:
                check(out, inputs)
        buffer.check()


def run_many(num_runs: int, in_flight: int) -> None:
    """Two buffers of different sizes, in turn, with several runs in flight."""
    mesh = mesh_of()
    with open_buffer(mesh) as one, open_buffer(mesh, num_experts=2 * mesh.size) as two:
        runs = [on_ranks(mesh, layer_of(buffer, Action())) for buffer in (one, two)]
        pending: list[tuple[Any, Any]] = []
        for number in range(num_runs):
            inputs = make_inputs(mesh, number)
            pending.append((runs[number % 2](*inputs), inputs))
            if len(pending) == in_flight:
                for out, given in pending:
                    check(out, given)
                pending.clear()
        for out, given in pending:
            check(out, given)
        one.check()
        two.check()


def run_alone() -> None:
    """On a buffer over this process's own devices."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("ep",))
    with open_buffer(mesh) as buffer:
        inputs = make_inputs(mesh, seed=jax.process_index())
        check(on_ranks(mesh, layer_of(buffer, Action()))(*inputs), inputs)
        assert buffer.message_bytes(jax.local_devices()[-1]) > 0


def run_in_groups() -> None:
    """Two groups at once, devices in turn; and a buffer over all devices beside theirs."""
    devices = np.array(jax.devices()).reshape(-1, 2).T
    meshes = (jax.sharding.Mesh(devices, ("dp", "ep")), mesh_of())
    num_experts = 2 * devices.size
    with contextlib.ExitStack() as stack:
        runs = []
        for mesh in meshes:
            buffer = stack.enter_context(open_buffer(mesh, num_experts=num_experts))
            runs.append((mesh, on_ranks(mesh, layer_of(buffer, Action()))))
        for number in range(20):
            for mesh, run in runs:
                inputs = make_inputs(mesh, number)
                check(run(*inputs), inputs)


def run_shared() -> None:
    """Equal programs without callbacks, which JAX puts into its cache of compiled programs."""
    mesh = mesh_of()
    with open_buffer(mesh) as buffer:
        one = on_ranks(mesh, layer_without_actions(buffer))
        other = on_ranks(mesh, layer_without_actions(buffer))
        for number in range(20):
            if number == 10:
                jax.clear_caches()
            inputs = make_inputs(mesh, number)
            check((one if number % 3 else other)(*inputs), inputs)
        buffer.check()


def run_mapped(num_places: int) -> None:
    """Several exchanges of one call, under jax.vmap, in flight at once and named apart."""
    mesh = mesh_of()
    with open_buffer(mesh, num_slots=num_places) as buffer:
        layer = layer_without_actions(buffer)

        def mapped(x: Any, topk_idx: Any, weights: Any) -> Any:
            factors = jnp.arange(1.0, num_places + 1)
            per_place = lambda factor: layer(factor * x, topk_idx, weights)  # noqa: E731
            return jax.vmap(per_place)(factors).sum(0)

        run = on_ranks(mesh, mapped)
        calls = re.findall(r'call = "([^"]*_send [^"]*)"', run.lower(*make_inputs(mesh)).as_text())
        assert len(set(calls)) == len(calls) == 2 * num_places, calls
        for number in range(20):
            x, topk_idx, weights = make_inputs(mesh, number)
            want = x * float(sum(range(1, num_places + 1)))
            check(run(x, topk_idx, weights), (want, topk_idx, weights))
        buffer.check()


def run_found_while_traced() -> None:
    """Layers that open their buffer while all processes trace the same program."""
    mesh = mesh_of()
    sizes = {"hidden": HIDDEN, "top_k": TOP_K, "max_tokens": TOKENS, "dtype": jnp.float32}
    sizes |= {"num_experts": mesh.size, "recv_capacity": mesh.size * TOKENS * TOP_K}

    def layer(x: Any, topk_idx: Any, weights: Any) -> Any:
        return layer_without_actions(smf.buffer_for("ep", **sizes))(x, topk_idx, weights)

    inputs = make_inputs(mesh)
    with jax.set_mesh(mesh):
        check(on_ranks(mesh, layer)(*inputs), inputs)
        smf.buffer_for("ep", **sizes).check()
