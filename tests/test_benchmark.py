"""The GPU benchmark, small and on CPU devices: that it runs, and that its contestants agree."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import benchmarks
from benchmarks import contestants, floors, layer, variants
from benchmarks.cases import Case, Load, make_inputs, measure_load
from jax_sm_free.doctor import bandwidth

pytestmark = pytest.mark.long

CASE = Case(24, 16, support.SOME_RANKS, "float32", num_experts=16, top_k=3, slack=1.1)
WIDTHS = layer.Widths(8, 12)
SMALL = (
    "--ep=2 --tokens=32 --hidden=64 --experts=16 --top_k=4 --gemm_rows=16 --gemms=2 --steps=2 "
    "--layer_steps=2 --expert_width=8 --shared_width=8 --seconds=0 --probe_mib=1 --sweep=wire "
    "--ragged_flags=xla_no_such_option=true"
)


def emulate_ragged(operand, output, input_offsets, send_sizes, output_offsets, _, *, axis_name):
    """What lax.ragged_all_to_all does, which XLA:CPU lacks; NaN in rows that nobody writes."""
    rows, begins, sizes, targets = (
        jax.lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    num_ranks = rows.shape[0]
    own = jax.lax.axis_index(axis_name)
    mine = (x.reshape(num_ranks, num_ranks, -1)[:, own] for x in (begins, sizes, targets))
    result = jnp.full_like(output, jnp.nan)
    for source, (begin, size, target) in enumerate(zip(*mine, strict=True)):
        place = jnp.arange(output.shape[0])[:, None] - target  # [row, update]
        here = (place >= 0) & (place < size)
        moved = rows[source][jnp.where(here, begin + place, 0).max(1)]
        result = jnp.where(here.any(1)[:, None], moved, result)
    return result


@pytest.fixture(scope="module")
def setting():
    """Mesh, inputs on the devices, and the load of CASE."""
    mesh = contestants.make_mesh(CASE.ep_size)
    inputs = make_inputs(CASE)
    return mesh, inputs, measure_load(CASE, inputs.topk_idx)


def run_layer(one, setting):
    """The layer's output and gradients."""
    mesh, inputs, load = setting
    params = layer.make_params(CASE, mesh, WIDTHS)
    bias = layer.make_bias(CASE, inputs.topk_idx, mesh)
    step = layer.forward_and_backward(one, CASE, load)

    def both(params, x, bias):
        out = layer.layer(one, CASE, load, params, x, bias)
        return out, step(jnp.float32(0), params, x, bias)

    x = contestants.put(inputs, CASE, mesh)[0]
    return contestants.on_ranks(both, mesh)(params, x, bias), params


def dense_layer(params, x, topk_idx):
    """The layer of rank 0's tokens in numpy, one token and expert at a time."""
    per_rank = {name: np.split(value, CASE.ep_size)[0] for name, value in params.items()}
    gelu = lambda h: np.asarray(jax.nn.gelu(h))  # noqa: E731
    out = x.copy()
    scores = np.asarray(jax.nn.softmax(x @ per_rank["router"]))
    for name in ("shared", "more"):
        out += gelu(x @ per_rank[f"{name}_up"]) @ per_rank[f"{name}_down"]
    for token, experts in enumerate(topk_idx):
        for expert in experts:
            h = gelu(x[token] @ params["up"][expert])
            out[token] += scores[token, expert] * (h @ params["down"][expert])
    return out


def test_layer_is_what_it_says(setting):
    _, inputs, load = setting
    (out, _), params = run_layer(contestants.make_peer(CASE, load), setting)
    mine = slice(0, CASE.tokens)
    want = dense_layer(jax.tree.map(np.asarray, params), inputs.x[mine], inputs.topk_idx[mine])
    np.testing.assert_allclose(np.asarray(out)[mine], want, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu_only
def test_contestants_agree(setting, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulate_ragged)
    mesh, _, load = setting
    ours = contestants.make_ours(CASE, load, mesh)
    want, _ = run_layer(ours, setting)
    support.assert_close(run_layer(contestants.make_peer(CASE, load), setting)[0], want, 1e-4)
    ragged = contestants.make_ragged(CASE, load, num_updates=7)
    support.assert_close(run_layer(ragged, setting)[0], want, 1e-4)
    in_batches = contestants.make_ours(CASE, load, mesh, in_batches=True)
    support.assert_close(run_layer(in_batches, setting)[0], want, 1e-4)
    in_batches.buffer.close()
    ours.buffer.close()


def test_wire_dtype_reaches_the_buffer(setting):
    mesh, _, load = setting
    case = Case(24, 256, CASE.ep_size, num_experts=16, wire_dtype="float8_e4m3fn")
    with contestants.make_ours(case, load, mesh).buffer as buffer:
        assert "float8_e4m3fn" in repr(buffer)


def test_floors():
    """By hand: 2 ranks, rows of 200 bytes, 1 GB/s in memory, 0.1 GB/s on the link."""
    case = Case(10, 100, 2)
    load = Load(np.array([[8, 6], [7, 9]]), np.array([[12, 14], [8, 16]]), 32, 9, 5)
    found = floors.of_case(case, load, bandwidth.Bandwidths(1e9, 1e8))
    there, back = found.phases["dispatch"], found.phases["combine"]
    assert there["route + pack"] == pytest.approx((10 + 7) * 0.2)
    assert there["wire"] == pytest.approx(7 * 2)
    assert there["unpack"] == pytest.approx((15 + 32) * 0.2)
    assert back["reduce-pack"] == pytest.approx((14 + 6) * 0.2)
    assert back["wire"] == pytest.approx(7 * 2)
    assert back["sum"] == pytest.approx((7 + 16 + 10) * 0.2)
    gradient = found.phases["dispatch gradient"]
    assert gradient["reduce-pack"] == pytest.approx((30 + 15) * 0.2)
    assert gradient["sum"] == pytest.approx((16 + 10) * 0.2)
    assert found.phases["combine gradient"]["route + pack"] == pytest.approx((10 + 16) * 0.2)
    assert found.phases["combine gradient"]["spread"] == pytest.approx((15 + 30 + 32) * 0.2)
    assert found.end_to_end("dispatch") == pytest.approx(7 * 2)
    assert found.end_to_end("combine gradient") == pytest.approx((10 + 16 + 15 + 30 + 32) * 0.2)
    assert found.exposed("combine", 4.0) == pytest.approx(4 + 6.6 + 10)
    assert floors.of_case(case, load, bandwidth.Bandwidths(1e9, None)).wire("combine") == 0


def test_options():
    text = "--xla_a=true,xla_b=false, xla_c=12,xla_d=SOME_MODE"
    want = {"xla_a": True, "xla_b": False, "xla_c": 12, "xla_d": "SOME_MODE"}
    assert variants.parse_options(text) == want
    assert variants.parse_options("") == {}
    with pytest.raises(ValueError, match="expected name=value, got 'xla_a'"):
        variants.parse_options("xla_a")


@pytest.mark.cpu_only
def test_command(tmp_path):
    """Each contestant that runs on CPU has a number in every row; the others have the reason."""
    root = pathlib.Path(benchmarks.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-m", "benchmarks.gpu", f"--out={tmp_path}", *SMALL.split()]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench_gpu.json").read_text())
    rows = {row["row"]: row["cells"] for row in report["rows"] if row["case"]["wire_dtype"] is None}
    assert not [name for name in rows if name.endswith("phases")]
    timed = ["dispatch", "combine", "layer forward", "layer forward + backward"]
    timed += ["dispatch + gradient", "combine + gradient"]
    timed += [f"{op} exposed, 2 GEMMs" for op in ("dispatch", "combine")]
    for name in timed:
        for who in ("ours", "all_to_all"):
            assert rows[name][who]["error"] is None, (name, who)
            assert rows[name][who]["value"] is not None, (name, who)
        assert name in result.stdout
    assert "No such compile option: 'xla_no_such_option'" in rows["dispatch"]["ragged"]["error"]
    assert rows["dispatch: wire"]["ours"]["value"] is None
    assert rows["dispatch: unpack"]["floor"]["value"] > 0
    assert (tmp_path / "bench_gpu.png").read_bytes().startswith(b"\x89PNG")


def test_what_hangs_is_left_and_its_numbers_kept():
    lines = (
        "import time",
        "from benchmarks.deadline import deadline",
        "with deadline(30, lambda: print('too early')): print('in time')",
        "with deadline(0.2, lambda: print('kept', flush=True)): time.sleep(60)",
    )
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=30
    )
    assert (run.returncode, run.stdout.split()) == (1, ["in", "time", "kept"])
