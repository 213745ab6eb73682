"""What ranks run in the tests in which one of several processes fails, closes or is late."""

from __future__ import annotations

from typing import Any

import jax
import layers

from processes import rank, together


def fail_once(
    how: str, place: str, survivors: int | None, timeout_s: float
) -> tuple[str, float, str]:
    """`fail` where the last process acts."""
    return fail({jax.process_count() - 1: (how, place)}, survivors, timeout_s)


def fail(
    acts: dict[int, tuple[str, str]], survivors: int | None, timeout_s: float, num_nodes: int = 1
) -> tuple[str, float, str]:
    """A good run, one in which some processes act, and a good run on a new buffer.

    Args:
      acts: by process, what it does and at which of `layers.PLACES`. "pause": it pauses, and the
        test kills or stops it. "announce": it says that it has come there. "raise": it raises,
        pauses and runs again. "raise, go on": it raises and runs again at once.
      survivors: processes that run on a new buffer afterwards; None for all.
      timeout_s: of the buffer.
      num_nodes: of the buffer.

    Returns:
      The error, the seconds it took, and what `check` raised.
    """
    mesh = layers.mesh_of(num_nodes=num_nodes)
    buffer = layers.open_buffer(mesh, timeout_s=timeout_s)
    inputs, action = layers.make_inputs(mesh), layers.Action()
    run = layers.on_ranks(mesh, layers.layer_of(buffer, action))
    layers.run_well(run, mesh, inputs)
    how, place = acts.get(jax.process_index(), ("", ""))
    action.place, action.do = place, lambda: act(how, place)
    error, seconds = layers.error_and_seconds(lambda: run(*inputs))
    rank.announce("has failed")
    if how == "raise" and "process died" in error:
        rank.pause("has raised")
    again, _ = layers.error_and_seconds(lambda: run(*inputs))
    kept = layers.fault_of(buffer)
    assert kept in again or "process died" in error, (kept, again)
    buffer.close()
    if survivors is None or jax.process_index() < survivors:
        layers.check_new_buffer(survivors, num_nodes if survivors is None else 1)
    return error, seconds, kept


def act(how: str, place: str) -> None:
    if how.startswith("raise"):
        raise RuntimeError("this process died")
    {"pause": rank.pause, "announce": rank.announce}[how](place)


def stop_shortly() -> None:
    """The last process pauses before its send; afterwards the run must succeed."""
    mesh = layers.mesh_of()
    with layers.open_buffer(mesh) as buffer:
        inputs, action = layers.make_inputs(mesh), layers.Action()
        run = layers.on_ranks(mesh, layers.layer_of(buffer, action))
        layers.check(run(*inputs), inputs)
        if jax.process_index() == jax.process_count() - 1:
            action.place, action.do = "before_send", lambda: rank.pause("before_send")
        layers.check(run(*inputs), inputs)
        buffer.check()


def close_early() -> tuple[str, float]:
    """The last process closes its buffer when it has run once; the others run again."""
    mesh = layers.mesh_of()
    buffer, inputs = layers.open_buffer(mesh), layers.make_inputs(mesh)
    run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
    layers.run_well(run, mesh, inputs)
    if jax.process_index() == jax.process_count() - 1:
        buffer.close()
        return "", 0.0
    return layers.error_and_seconds(lambda: run(*inputs))


def end_one_of_two() -> tuple[str, str]:
    """Ends one buffer by closing it in the last process, the next by a timeout; another goes on.

    Returns:
      The errors of both buffers in the first process; every process returns them.
    """
    mesh = layers.mesh_of()
    inputs = layers.make_inputs(mesh)
    is_last = jax.process_index() == jax.process_count() - 1
    errors = []
    # Buffers of different timeouts would not share a wire.
    with layers.open_buffer(mesh, timeout_s=layers.TIMEOUT_S) as kept:
        run_kept = layers.on_ranks(mesh, layers.layer_of(kept, layers.Action()))
        layers.run_well(run_kept, mesh, inputs)
        for ending in ("close", "leave out"):
            with layers.open_buffer(mesh, timeout_s=layers.TIMEOUT_S) as buffer:
                run = layers.on_ranks(mesh, layers.layer_of(buffer, layers.Action()))
                layers.run_well(run, mesh, inputs)
                if is_last and ending == "close":
                    buffer.close()
                error = "" if is_last else layers.error_and_seconds(lambda: run(*inputs))[0]  # noqa: B023
                errors.append(together.told_to_all(mesh, error)[0])
            for _ in range(3):
                layers.check(run_kept(*inputs), inputs)
        kept.check()
    return errors[0], errors[1]


def run_differently(how: str, num_nodes: int = 1) -> tuple[str, float]:
    """The last process runs another program than the others, as their second run."""
    mesh = layers.mesh_of(num_nodes=num_nodes)
    inputs = layers.make_inputs(mesh)
    buffer = layers.open_buffer(mesh, num_slots=3)
    layer = layers.layer_of(buffer, layers.Action())
    layers.run_well(layers.on_ranks(mesh, layer), mesh, inputs)

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
    run = layers.on_ranks(mesh, other if is_last else ours)
    result = layers.error_and_seconds(lambda: run(*inputs))
    buffer.close()
    layers.check_new_buffer()
    return result
