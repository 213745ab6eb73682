"""Dispatch, combine and a whole layer on GPUs: ours, XLA's collectives, and the floor.

    python -m benchmarks.gpu                                    # the headline table, on all GPUs
    python -m benchmarks.gpu --rows=dispatch,combine --contestants=ours --ep=2
    python -m benchmarks.gpu --rows= --sweep=tokens,ep,wire     # end to end over many cases

Prints one table; writes it to <out>/bench_gpu.json after each number, and to <out>/bench_gpu.png.
Times are medians of loops, for each step of the loop. On CPU devices it runs too, for tests: phases
then have no numbers. Under jax.distributed each process writes what it saw to <out>/process_<n>;
link bandwidth and floors are those of its own devices. benchmarks.gpu_processes starts it so.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import time

# The buffers of jax_sm_free are outside XLA's pool.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
from absl import app, flags, logging

from benchmarks import floors, measurements, plots, report, variants
from benchmarks.cases import Case
from benchmarks.deadline import deadline
from benchmarks.layer import Widths
from benchmarks.measurements import OPS, Runs
from benchmarks.setting import Plan, Setting
from benchmarks.table import CONTESTANTS, Table
from jax_sm_free.doctor import bandwidth

ROWS = (*OPS, "phases", "exposed", "gradients", "layer")
SWEEPS = ("tokens", "ep", "wire")
_SWEPT_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
_SWEPT_RANKS = (2, 4, 8)
_FLOAT8 = "float8_e4m3fn"

_EP = flags.DEFINE_integer("ep", 0, "Ranks; 0 for all devices.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens of a rank.")
_HIDDEN = flags.DEFINE_integer("hidden", 7168, "Columns of a row.")
_EXPERTS = flags.DEFINE_integer("experts", 256, "Experts of all ranks.")
_TOP_K = flags.DEFINE_integer("top_k", 8, "Experts of a token.")
_SLACK = flags.DEFINE_float("slack", 1.1, "Capacities over the balanced load.")
_WIRE = flags.DEFINE_string("wire_dtype", None, f"What rows travel as, for example {_FLOAT8}.")
_ROWS = flags.DEFINE_list("rows", [*ROWS], f"Of {ROWS}; phases go with dispatch and combine.")
_CONTESTANTS = flags.DEFINE_list("contestants", [*CONTESTANTS], f"Of {CONTESTANTS}.")
_SWEEP = flags.DEFINE_list("sweep", [], f"Of {SWEEPS}: more cases, end to end.")
_GEMMS = flags.DEFINE_list("gemms", ["0.25", "0.5", "1", "2", "4"], "GEMMs between send and recv.")
_GEMM_ROWS = flags.DEFINE_integer("gemm_rows", 4096, "Rows of a whole GEMM.")
_EXPERT_WIDTH = flags.DEFINE_integer("expert_width", 512, "Width of the layer's routed experts.")
_SHARED_WIDTH = flags.DEFINE_integer("shared_width", 2048, "Width of the layer's dense experts.")
_STEPS = flags.DEFINE_integer("steps", 40, "Exchanges of a loop.")
_LAYER_STEPS = flags.DEFINE_integer("layer_steps", 10, "Layers of a loop.")
_SECONDS = flags.DEFINE_float("seconds", 0.5, "Time for each number, once it has 5 runs.")
_LIMIT = flags.DEFINE_float("limit", 180, "Seconds for a contestant in one case; then all ends.")
_PROBE_MIB = flags.DEFINE_integer("probe_mib", 1024, "Array by which bandwidths are measured.")
_RAGGED_FLAGS = flags.DEFINE_string(
    "ragged_flags", None, "XLA options for ragged, name=value,...; without, the best of several."
)
_RAGGED_UPDATES = flags.DEFINE_integer("ragged_updates", 1, "Parts of a message, for these flags.")
_OUT = flags.DEFINE_string("out", "out", "Where the table, the picture and the profiles go.")


def _headline() -> Case:
    return Case(
        tokens=_TOKENS.value,
        hidden=_HIDDEN.value,
        ep_size=_EP.value or jax.device_count(),
        num_experts=_EXPERTS.value,
        top_k=_TOP_K.value,
        slack=_SLACK.value,
        wire_dtype=_WIRE.value,
    )


def _swept(headline: Case) -> list[Case]:
    cases = []
    if "tokens" in _SWEEP.value:
        cases += [dataclasses.replace(headline, tokens=tokens) for tokens in _SWEPT_TOKENS]
    if "ep" in _SWEEP.value:
        ranks = [ep for ep in _SWEPT_RANKS if ep <= jax.device_count()]
        cases += [dataclasses.replace(headline, ep_size=ep) for ep in ranks]
    if "wire" in _SWEEP.value:
        cases += [dataclasses.replace(headline, wire_dtype=wire) for wire in (None, _FLOAT8)]
    return list(dict.fromkeys(cases))


def _plan(out: pathlib.Path) -> Plan:
    return Plan(
        num_gemms=tuple(float(num) for num in _GEMMS.value),
        gemm_rows=_GEMM_ROWS.value,
        steps=_STEPS.value,
        layer_steps=_LAYER_STEPS.value,
        seconds=_SECONDS.value,
        widths=Widths(_EXPERT_WIDTH.value, _SHARED_WIDTH.value),
        traces=out / "profiles",
    )


def _fastest(setting: Setting, who: str, table: Table) -> Runs:
    """The contestant by its fastest variant.

    Raises:
      RuntimeError: if none works, with the reason of each.
    """
    options = _RAGGED_FLAGS.value
    parsed = None if options is None else variants.parse_options(options)
    choices = variants.of(who, parsed, _RAGGED_UPDATES.value)
    if who == "ours":  # There is one, and each of its rows shows what fails.
        return Runs(setting, who, choices[0], table)
    tried: dict[str, float | str] = {}
    best: tuple[float, Runs] | None = None
    for variant in choices:
        try:
            runs = Runs(setting, who, variant, table)
            us = runs.time("dispatch")
        except Exception as error:
            tried[str(variant)] = measurements.describe(error)
            continue
        tried[str(variant)] = us
        if best is None or us < best[0]:
            best = us, runs
    table.about(**{f"variants of {who}, dispatch us, {setting.case}": tried})
    for label, result in tried.items():
        print(f"{who}, dispatch: {label}: {result}", flush=True)
    if best is None:
        raise RuntimeError(f"no variant works; the last one: {result}")
    return best[1]


def _run(setting: Setting, who: str, wanted: list[str], table: Table) -> None:
    """Fills the rows of one contestant."""
    try:
        runs = _fastest(setting, who, table)
    except Exception as error:
        table.put(setting.case, "dispatch", who, None, error=measurements.describe(error))
        return
    print(f"{who}: {runs.variant}", flush=True)
    for op in OPS:
        if op in wanted:
            with runs.row(op):
                runs.end_to_end(op)
            if "phases" in wanted:
                with runs.row(f"{op}: phases"):
                    runs.phases(op)
    if "exposed" in wanted:
        for op in OPS:
            with runs.row(f"{op} exposed"):
                runs.exposed(op)
    if "gradients" in wanted:
        for op in OPS:
            with runs.row(f"{op} + gradient"):
                runs.gradient(op)
    if "layer" in wanted:
        with runs.row("layer"):
            runs.layer()
    with runs.row("faults"):
        runs.close()


def _give_up(case: Case, who: str, table: Table) -> None:
    """Says which contestant hangs, and shows the numbers so far."""
    error = f"expected an end within {_LIMIT.value:g} s (--limit), got none"
    table.put(case, "all rows", who, None, error=error)
    print(table.text(), flush=True)


def _check_flags() -> None:
    for flag, known in ((_ROWS, ROWS), (_CONTESTANTS, CONTESTANTS), (_SWEEP, SWEEPS)):
        unknown = set(flag.value) - set(known)
        if unknown:
            raise app.UsageError(f"--{flag.name}: expected {known}, got {sorted(unknown)}")
    if _EP.value > jax.device_count():
        raise app.UsageError(f"--ep: expected at most {jax.device_count()}, got {_EP.value}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    _check_flags()
    begin = time.monotonic()
    out = pathlib.Path(_OUT.value)
    if jax.process_count() > 1:
        out /= f"process_{jax.process_index()}"
    device = jax.devices()[0]
    about = {
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.client.platform_version,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "contestants": variants.DESCRIPTIONS,
    }
    about_all = {**about, "machine": report.machine(), "versions": report.versions()}
    for name, value in {**about_all, "command": " ".join(sys.orig_argv)}.items():
        print(f"{name}: {value}")
    bandwidths = bandwidth.measure(
        jax.local_devices()[: _EP.value or None], _PROBE_MIB.value * 2**20
    )
    link = f"{bandwidths.link / 1e9:.0f}" if bandwidths.link else "-"
    print(f"measured: local copy {bandwidths.local / 1e9:.0f} GB/s, egress {link} GB/s")
    print(floors.FORMULAS, flush=True)

    table = Table(out / "bench_gpu.json", **about, bandwidths=dataclasses.asdict(bandwidths))
    headline, plan = _headline(), _plan(out)
    work = [(headline, _ROWS.value)] if any(_ROWS.value) else []
    work += [(case, list(OPS)) for case in _swept(headline) if not (work and case == headline)]
    for case, wanted in work:
        setting = Setting(case, plan, bandwidths)
        measurements.put_floors(setting, table)
        for who in _CONTESTANTS.value:
            if who != "ours" and case.wire_dtype is not None:
                continue  # Only `ragged` has this option.
            with deadline(_LIMIT.value, lambda who=who, case=case: _give_up(case, who, table)):
                _run(setting, who, wanted, table)
            print(f"{case}: {who} after {time.monotonic() - begin:.0f} s", flush=True)
    print(table.text())
    plots.draw(table, headline, out / "bench_gpu.png")
    print(f"{table.path}, {out / 'bench_gpu.png'}; {time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    app.run(main)
