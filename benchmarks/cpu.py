"""Dispatch, combine and a whole layer on CPU devices: ours, pure JAX, and memcpy.

    python -m benchmarks.cpu [--quick]

All ranks share this machine's cores; a time is that of all ranks together.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
from absl import app, flags, logging
from jax import P
from jax.sharding import NamedSharding

from benchmarks import contestants, dense, report, timing
from benchmarks.cases import Case, make_inputs, measure_load
from benchmarks.memcpy import Memcpy, bytes_moved
from benchmarks.report import Row

_QUICK = flags.DEFINE_boolean("quick", False, "Only the headline case, with fewer runs.")
_KEEP_PAGES = flags.DEFINE_boolean("keep_pages", True, "Keep freed memory instead of returning it.")
_OUT = flags.DEFINE_string("out", "out/bench_cpu.json", "Where all times go.")

HEADLINE = Case(1024, 1024, 8)
TOKENS = tuple(Case(tokens, 1024, 8) for tokens in (64, 256, 1024, 4096))
EXCHANGES = (
    *TOKENS,
    *(Case(1024, hidden, 8) for hidden in (256, 512, 2048)),
    *(Case(1024, 1024, ep_size) for ep_size in (2, 4)),
    Case(1024, 1024, 8, "float32"),
)
LAYER = Case(256, 256, 8, "float32")
# Layers so small that what an exchange costs without rows is most of it.
TINY = tuple(
    Case(tokens, 32, 8, "float32", num_experts=16, top_k=4, slack=2.0) for tokens in (16, 32, 64)
)

# Ours over the other, at most, for dispatch and for combine of the headline case.
TARGETS = {"pure": 0.5, "memcpy": 3.0}
TINY_TARGET = 1.5


def _race(runners: dict) -> dict:
    seconds, least, most = (4.0, 5, 15) if _QUICK.value else (10.0, 7, 40)
    return timing.race(runners, seconds, least, most)


def _blocking(fn, *args):
    return lambda: jax.block_until_ready(fn(*args))


def _check_same(ours, pure, got, want) -> None:
    """Nothing dropped; the same rows in the same places; the same sums but for rounding."""
    for grouped in (ours, pure):
        assert int(np.asarray(grouped.overflow).sum()) == 0
    for name in ("x", "group_sizes", "weights"):
        np.testing.assert_array_equal(*(np.asarray(getattr(g, name)) for g in (ours, pure)))
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, want)), 0.02, 0.02)


class Race:
    """One case: both contestants, and their inputs on the devices."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.mesh = contestants.make_mesh(case.ep_size)
        inputs = make_inputs(case)
        self.load = measure_load(case, inputs.topk_idx)
        self.args = contestants.put(inputs, case, self.mesh)
        self.both = {
            "ours": contestants.make_ours(case, self.load, self.mesh),
            "pure": contestants.make_peer(case, self.load),
        }

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        self.both["ours"].buffer.close()

    def compile(self, make) -> dict:
        """make(contestant) is a function per rank."""
        return {who: contestants.on_ranks(make(one), self.mesh) for who, one in self.both.items()}

    def run(self, operation: str, fns: dict, args: dict, **others) -> Row:
        """Times `fns` on `args`, each by contestant."""
        runners = {who: _blocking(fn, *args[who]) for who, fn in fns.items()}
        return Row(self.case, operation, _race({**runners, **others}))


def run_exchange(case: Case, backward: bool) -> Iterator[Row]:
    """Times dispatch and combine, and both with their gradients."""
    with Race(case) as race:
        there = race.compile(lambda one: one.dispatch)
        back = race.compile(lambda one: one.combine)
        there_args = dict.fromkeys(there, race.args)
        grouped = {who: fn(*race.args) for who, fn in there.items()}
        back_args = {who: (g.x, g.handle, g.weights) for who, g in grouped.items()}
        _check_same(*grouped.values(), *(fn(*back_args[who]) for who, fn in back.items()))

        memcpy = Memcpy(bytes_moved(case, race.load))
        yield race.run("dispatch", there, there_args, memcpy=memcpy)
        yield race.run("combine", back, back_args, memcpy=memcpy)
        memcpy.close()
        if backward:
            ct = (grouped["ours"].x, grouped["ours"].weights)
            args = dict.fromkeys(there, (*race.args, ct))
            yield race.run("dispatch fwd+bwd", race.compile(contestants.dispatch_and_back), args)
            args = {who: (*back_args[who], race.args[0]) for who in back}
            yield race.run("combine fwd+bwd", race.compile(contestants.combine_and_back), args)


def run_layer(case: Case) -> Iterator[Row]:
    """Times forward and backward of a layer."""
    with Race(case) as race:
        fns = race.compile(contestants.layer_and_back)
        args = (*race.args, *contestants.make_mlp(case, race.mesh))
        yield race.run("layer fwd+bwd", fns, dict.fromkeys(fns, args))


def run_tiny_layer(case: Case) -> Iterator[Row]:
    """The same beside layers that give all tokens to all experts; see `dense`."""
    with Race(case) as race:
        axis, split = contestants.AXIS, contestants.SPLIT
        params = contestants.make_mlp(case, race.mesh)
        everywhere = jax.device_put(params, NamedSharding(race.mesh, P()))
        fns = race.compile(contestants.layer_and_back)
        fns["gathered"] = contestants.on_ranks(dense.gathered_and_back(case, axis), race.mesh)
        fns["replicated"] = contestants.on_ranks(
            dense.replicated_and_back(case, axis), race.mesh, in_specs=(split,) * 3 + (P(),) * 2
        )
        args = dict.fromkeys(fns, (*race.args, *params))
        args["replicated"] = (*race.args, *everywhere)
        _check_grads(*(fn(*args[who]) for who, fn in fns.items()))
        yield race.run("tiny layer fwd+bwd", fns, args)


def _check_grads(want, *others) -> None:
    for got in others:
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def _tiny(rows: list[Row]) -> list[str]:
    """Ours beside the faster of the dense layers."""
    lines = []
    for row in rows:
        if row.case not in TINY:
            continue
        who = min(("gathered", "replicated"), key=row.ms)
        met = "met" if row.ratio(who) <= TINY_TARGET else "MISSED"
        lines.append(
            f"{row.operation}, {row.case}: {row.ratio(who):.2f} of all experts on all tokens "
            f"({who}: {row.ms(who):.2f} ms), target {TINY_TARGET:.1f}: {met}"
        )
    return lines


def _headline(rows: list[Row]) -> list[str]:
    return [
        f"{row.operation}, {row.case}: {row.ratio(who):.2f} of {who}, target {most:.1f}: "
        f"{'met' if row.ratio(who) <= most else 'MISSED'}"
        for row in rows
        if row.case == HEADLINE and row.operation in ("dispatch", "combine")
        for who, most in TARGETS.items()
    ]


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    if _KEEP_PAGES.value:
        timing.keep_pages()
    print(f"{report.machine()}\n{report.versions()}")
    print(
        f"top-{HEADLINE.top_k} of {HEADLINE.num_experts} experts, capacity {HEADLINE.slack} of a "
        f"balanced load, nothing dropped; medians; freed memory is "
        f"{'kept' if _KEEP_PAGES.value else 'returned'}\n"
    )
    print(report.header())
    rows: list[Row] = []

    cases = (HEADLINE,) if _QUICK.value else EXCHANGES
    for row in itertools.chain(
        *(run_exchange(case, case == HEADLINE) for case in cases),
        run_layer(LAYER),
        *map(run_tiny_layer, TINY),
    ):
        print(report.line(row), flush=True)
        rows.append(row)

    summary = _headline(rows) + _tiny(rows)
    if not _QUICK.value:
        summary += report.linearity([row for row in rows if row.case in TOKENS])
    print("", *summary, sep="\n")
    path = pathlib.Path(_OUT.value)
    report.write(path, rows, keep_pages=_KEEP_PAGES.value, summary=summary)
    print(f"all times: {path}")


if __name__ == "__main__":
    app.run(main)
