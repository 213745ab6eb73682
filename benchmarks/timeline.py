"""A picture of what GPUs did in one layer, from a profile.

    python -m benchmarks.timeline --record --out=docs/timeline.png   # runs a layer and profiles it
    python -m benchmarks.timeline --profile=out/timeline --gpus=0,1  # draws one that is there

The layer is that of the benchmark: a dense expert beside the dispatch, another beside the combine.
"""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
from absl import app, flags

from benchmarks import contestants, drawing, layer, profiled_exchanges, programs, trace
from benchmarks.cases import Case, make_inputs, measure_load
from benchmarks.trace import Event

_RECORD = flags.DEFINE_bool("record", False, "Run a layer and profile it into --profile.")
_PROFILE = flags.DEFINE_string("profile", "out/timeline", "A profile: a directory, or its file.")
_GPUS = flags.DEFINE_list("gpus", ["0"], "The GPUs to draw.")
_PNG = flags.DEFINE_string("out", "out/timeline.png", "The picture.")

_LAYERS = 4  # Of a loop; the one before the last is drawn.


def record(case: Case, widths: layer.Widths, directory: pathlib.Path) -> list[Event]:
    """Profiles a loop of layers on the library, after a run to warm up."""
    mesh = contestants.make_mesh(case.ep_size)
    inputs = make_inputs(case)
    load = measure_load(case, inputs.topk_idx)
    ours = contestants.make_ours(case, load, mesh, in_batches=True)
    x = contestants.put(inputs, case, mesh)[0]
    params = layer.make_params(case, mesh, widths)
    args = (params, x, layer.make_bias(case, inputs.topk_idx, mesh))
    step = programs.loop(layer.forward(ours, case, load), _LAYERS)
    run = programs.compile_one(contestants.on_ranks(step, mesh), args)
    run()
    run()
    events = trace.record(run, directory)
    ours.buffer.check()
    ours.buffer.close()
    return events


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    profile = pathlib.Path(_PROFILE.value)
    if _RECORD.value:
        case = Case(4096, 7168, jax.device_count(), num_experts=256, slack=1.1)
        events = record(case, layer.Widths(), profile)
    else:
        events = trace.read(profile)
    gpus = [int(gpu) for gpu in _GPUS.value]
    for exchange in profiled_exchanges.exchanges(events):
        copies = trace.length(trace.union(exchange.copies))
        gpu = exchange.send[0].gpu
        print(f"GPU {gpu} {exchange.op}: {exchange.hidden_us:.0f} of {copies:.0f} us under GEMMs")
    path = pathlib.Path(_PNG.value)
    drawing.draw(events, gpus, path)
    print(path)


if __name__ == "__main__":
    app.run(main)
