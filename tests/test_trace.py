"""Profiles of GPUs: how they are read, and what they show of a layer where there are GPUs."""

from __future__ import annotations

import gzip
import json
from typing import Any

import jax
import pytest
import support

from benchmarks import drawing, layer, phases, profiled_exchanges, timeline, trace
from benchmarks.cases import Case

COMPUTE, COPIES = 13, (21, 22)
PEER_BYTES = 50_000_000


def kernel(name: str, start: float, duration: float, blocks: int = 132) -> dict:
    details = f"regs:40 static_shared:0 dynamic_shared:0 grid:{blocks},1,1 block:256,1,1 occ_pct:50"
    return event(name, start, duration, COMPUTE, {"kernel_details": details})


def ours(name: str, start: float, duration: float, blocks: int = 132) -> dict:
    full = f"void jax_sm_free::cuda::(anonymous namespace)::{name}(jax_sm_free::cuda::RankView)"
    return kernel(full, start, duration, blocks)


def gemm(start: float, duration: float) -> dict:
    return kernel("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNN", start, duration)


def copy(start: float, duration: float, stream: int = COPIES[0]) -> dict:
    details = f"kind_src:device kind_dst:device size:{PEER_BYTES} dest:1 async:1"
    return event("MemcpyP2P", start, duration, stream, {"memcpy_details": details})


def event(name: str, start: float, duration: float, stream: int, args: dict) -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "tid": stream, "args": args}


def dispatch(start: float, shift: float = 0.0) -> list[dict]:
    """A dispatch as it should be: 410 us in all, 60 us of the second copy after the GEMM."""
    return [
        ours("BeginAndCountKernel", start, 6),
        ours("PlaceKernel", start + 6, 4),
        ours("PackKernel", start + 10, 50),
        gemm(start + 60 + shift, 200),
        copy(start + 40, 130, COPIES[0]),
        copy(start + 190, 130, COPIES[1]),
        ours("WaitKernel", start + 260, 5, blocks=1),
        ours("PlanKernel", start + 265, 5, blocks=1),
        ours("UnpackExpertsKernel<2, true>", start + 270, 140),
    ]


def combine(start: float) -> list[dict]:
    """A combine as it should be, of 350 us."""
    return [
        ours("BeginPackSumsKernel", start, 4, blocks=1),
        ours("PackSumsKernel<bf16, 8, true>", start + 4, 96),
        copy(start + 50, 100),
        gemm(start + 100, 200),
        ours("CountKernel", start + 300, 4),
        ours("PlaceKernel", start + 304, 2),
        ours("WaitKernel", start + 306, 4, blocks=1),
        ours("SumKernel<bf16, 8>", start + 310, 40),
    ]


def profile(tmp_path: Any, entries: list[dict], num_gpus: int = 2) -> list[trace.Event]:
    """Writes the same events for each GPU as jax.profiler does, among others; and reads them."""
    everything: list[dict] = [
        meta("process_name", 1, 0, "/host:CPU"),
        meta("thread_name", 1, 5, "python"),
        {"ph": "X", "pid": 1, "tid": 5, "name": "gemm of the host", "ts": 0, "dur": 5},
        {},
    ]
    for gpu in range(num_gpus):
        pid = 100 + gpu
        everything.append(meta("process_name", pid, 0, f"/device:GPU:{gpu}"))
        everything.append(meta("thread_name", pid, COMPUTE, f"Stream #{COMPUTE}(Compute)"))
        everything.append(meta("thread_name", pid, 900, "XLA Ops"))
        everything.append({"ph": "X", "pid": pid, "tid": 900, "name": "dot.1", "ts": 0, "dur": 9})
        for stream in COPIES:
            everything.append(meta("thread_name", pid, stream, f"Stream #{stream}(MemcpyP2P)"))
        everything += [{"pid": pid, **entry} for entry in entries]
    path = tmp_path / "plugins" / "profile" / "today" / "host.trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump({"displayTimeUnit": "ns", "traceEvents": everything}, file)
    return trace.read(tmp_path)


def meta(name: str, pid: int, tid: int, label: str) -> dict:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": {"name": label}}


# --------------------------------------------------------------------------------------- reading


def test_reads_streams_of_gpus_alone(tmp_path):
    events = profile(tmp_path, [gemm(60, 200), ours("PackKernel", 10, 50), copy(40, 130)])
    assert [(e.gpu, e.stream, e.kind) for e in events] == [
        (gpu, stream, kind)
        for gpu in (0, 1)
        for stream, kind in ((COMPUTE, "ours"), (COPIES[0], "copy"), (COMPUTE, "gemm"))
    ]
    pack, moved, product = events[:3]
    assert (pack.short_name, pack.phase, pack.num_blocks) == ("Pack", "pack", 132)
    assert (moved.num_bytes, moved.interval) == (PEER_BYTES, (40, 170))
    assert (product.num_bytes, product.duration_us) == (0, 200)


def test_no_profile(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"trace\.json\.gz"):
        trace.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("BeginAndCountKernel", "route"),
        ("PackKernel", "pack"),
        ("PackQuantizedKernel", "pack"),
        ("BeginPackSumsKernel", "reduce-pack"),
        ("PackSumsKernel", "reduce-pack"),
        ("BulkUnpackExpertsKernel", "unpack"),
        ("PlanKernel", "unpack"),
        ("WaitKernel", "wait"),
        ("SumKernel", "sum"),
        ("ForwardCountKernel", "route"),
        ("ForwardPlaceKernel", "route"),
        ("ForwardRowsKernel", "forward"),
        ("ForwardSumsKernel<bf16, true>", "forward"),
        ("NewKernel", "unknown"),
    ],
)
def test_phase_of_a_kernel(tmp_path, name, phase):
    assert profile(tmp_path, [ours(name, 0, 1)])[0].phase == phase


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemm_fusion_dot_general_4", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "gemm"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("void stream_executor::gpu::RaggedAllToAllKernelImpl<8l>()", "collective"),
        ("loop_select_fusion_1", "other"),
        ("MemcpyD2D", "copy"),
        ("MemcpyH2D", "other"),
        ("Memset", "other"),
    ],
)
def test_kind_of_an_event(tmp_path, name, kind):
    assert profile(tmp_path, [kernel(name, 0, 1)])[0].kind == kind


def test_intervals():
    events = [trace.Event(0, 1, "", start, 10) for start in (0, 5, 30)]
    assert trace.union(events) == [(0, 15), (30, 40)]
    assert trace.length(trace.union(events)) == 25
    assert trace.common(trace.union(events), [(10, 32)]) == 7


# ---------------------------------------------------------------------------------------- phases


def test_phases_of_an_exchange(tmp_path):
    entries = [entry for i in range(5) for entry in dispatch(1000.0 * i)]
    found = phases.of_ours(profile(tmp_path, entries), num_sms=132)
    assert found.kernels_us == {"route": 10, "pack": 50, "wait": 5, "unpack": 145}
    assert (found.wire_us, found.busy_us) == (280, 260)
    assert found.egress == pytest.approx(2 * PEER_BYTES / 260e-6 / 1e9)
    # One block holds one of the 132 SMs.
    assert found.sm_us == pytest.approx(6 + 4 + 50 + 140 + (5 + 5) / 132)


def test_phases_of_kernels_that_come_early(tmp_path):
    # Place and Pack are there before the kernel ahead of them has ended, and end as they did.
    early = {"Place": 5, "Pack": 9}
    entries = dispatch(0)
    for entry in entries:
        for name, ahead in early.items():
            if f"::{name}" in entry["name"]:
                entry |= {"ts": entry["ts"] - ahead, "dur": entry["dur"] + ahead}
    found = phases.of_ours(profile(tmp_path, entries), num_sms=132)
    assert found.kernels_us == {"route": 10, "pack": 50, "wait": 5, "unpack": 145}
    assert found.sm_us == pytest.approx(6 + 4 + 50 + 140 + (5 + 5) / 132)


def test_phases_leave_out_the_start_of_a_loop(tmp_path):
    slow = [{**entry, "dur": 10 * entry["dur"]} for entry in combine(0)]
    entries = slow + [entry for i in range(1, 5) for entry in combine(1000.0 * i)]
    found = phases.of_ours(profile(tmp_path, entries), num_sms=0)
    assert found.kernels_us == {"route": 6, "reduce-pack": 100, "wait": 4, "sum": 40}
    assert found.sm_us is None


def test_phases_of_exchanges_that_have_one(tmp_path):
    kinds = [dispatch, combine] * 4
    entries = [entry for i, kind in enumerate(kinds) for entry in kind(1000.0 * i)]
    events = profile(tmp_path, entries)
    combines = phases.of_ours(events, num_sms=132, having="sum")
    assert combines.kernels_us == {"route": 6, "reduce-pack": 100, "wait": 4, "sum": 40}
    assert phases.of_ours(events, num_sms=132, having="spread") is None


def test_phases_of_collectives(tmp_path):
    entries = [kernel("ncclDevKernel_SendRecv()", 100.0 * i, 50, blocks=33) for i in range(4)]
    entries += [kernel("loop_select_fusion", 100.0 * i + 60, 10) for i in range(4)]
    found = phases.of_peer(profile(tmp_path, entries), num_exchanges=4, num_sms=132)
    assert (found.wire_us, found.egress) == (50, None)
    assert found.sm_us == pytest.approx(50 / 4 + 10)


def test_no_phases_without_gpus(tmp_path):
    events = profile(tmp_path, dispatch(0), num_gpus=0)
    assert events == []
    assert phases.of_ours(events, 132) is None
    assert phases.of_peer(events, 1, 132) is None
    assert phases.gemm_slowdown(events, events) is None


def test_gemm_slowdown(tmp_path):
    alone = profile(tmp_path / "alone", [gemm(300.0 * i, 190) for i in range(5)])
    beside = profile(tmp_path / "beside", dispatch(0))
    # A GEMM of 200 us, beside copies for 110 and for 70 of them: neither one nor the other.
    assert phases.gemm_slowdown(alone, beside) is None
    assert phases.gemm_slowdown(alone, alone) is None
    beside = [*dispatch(0), gemm(500, 192), copy(490, 220)]
    assert phases.gemm_slowdown(alone, profile(tmp_path / "1", beside)) == pytest.approx(
        192 / 190 - 1
    )
    # The third has nothing beside it.
    beside += [gemm(800, 180)]
    assert phases.gemm_slowdown(alone, profile(tmp_path / "2", beside)) == pytest.approx(
        192 / 180 - 1
    )


# --------------------------------------------------------------------------------------- overlap


def check_all(events: list[trace.Event]) -> list[profiled_exchanges.Exchange]:
    found = profiled_exchanges.exchanges(events)
    for exchange in found:
        exchange.check()
    return found


def test_good_layer(tmp_path):
    # The experts are no part of an exchange, also where they begin as its last kernel ends.
    after = [gemm(409.9, 60), gemm(480, 50)]
    found = check_all(profile(tmp_path, [*dispatch(0), *after, *combine(600)]))
    assert [exchange.op for exchange in found] == ["dispatch", "combine"] * 2
    assert [exchange.hidden_us for exchange in found[:2]] == [180, 50]


def without(entries: list[dict], text: str) -> list[dict]:
    return [entry for entry in entries if text not in entry["name"]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (without(dispatch(0), "nvjet"), "GEMM between send and recv, got none"),
        ([*without(dispatch(0), "nvjet"), gemm(420, 200)], "GEMM between send and recv, got none"),
        (without(dispatch(0), "Memcpy"), "expected copies while GEMMs run, got 0 copies"),
        ([*without(dispatch(0), "Memcpy"), copy(262, 50)], "got 1 copies, none beside a GEMM"),
        (dispatch(0, shift=30), "expected Wait after the last GEMM"),
        (dispatch(0, shift=-52), "expected Pack before the first GEMM"),
        ([*dispatch(0), ours("PackKernel", 100, 5)], "expected Pack before the first GEMM"),
        ([*dispatch(0), ours("UnpackTokensKernel", 200, 5)], "expected UnpackTokens after the"),
        ([*dispatch(0), ours("NewKernel", 100, 5)], "expected New after the last GEMM"),
        (dispatch(0)[:5], "expected kernels of a recv, got none"),
    ],
)
def test_bad_layer(tmp_path, entries, message):
    with pytest.raises(AssertionError, match=message):
        check_all(profile(tmp_path, entries))


def test_timeline_draws_the_last_whole_layer(tmp_path):
    starts = [1000.0 * i for i in range(3)]
    entries = [entry for t in starts for entry in (*dispatch(t), *combine(t + 500))]
    events = profile(tmp_path, entries)
    shown = drawing.one_layer(trace.by_gpu(events)[1])
    assert [e.op for e in profiled_exchanges.exchanges(shown)] == ["dispatch", "combine"]
    assert {e.gpu for e in shown} == {1}
    assert shown[0].start_us == 1000
    drawing.draw(events, [0, 1], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least two dispatches in the profile, got 0"):
        drawing.draw(events, [2], tmp_path / "timeline.png")


# ------------------------------------------------------------------------------------ on devices


def record_layer(
    tmp_path: Any, tokens: int, hidden: int, widths: layer.Widths
) -> list[trace.Event]:
    case = Case(tokens, hidden, support.SOME_RANKS, num_experts=8 * support.SOME_RANKS, top_k=4)
    return timeline.record(case, widths, tmp_path)


@pytest.mark.cpu_only
def test_layer_is_profiled_on_cpu(tmp_path):
    assert record_layer(tmp_path, 16, 64, layer.Widths(8, 8)) == []


@pytest.mark.alone
@pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 2,
    reason="shows what copy engines and SMs of several GPUs did",
)
def test_gemms_run_between_send_and_recv_and_copies_under_them(tmp_path):
    events = record_layer(tmp_path, 4096, 4096, layer.Widths(512, 8192))
    found = check_all(events)
    per_gpu = [sum(e.send[0].gpu == gpu for e in found) for gpu in range(support.SOME_RANKS)]
    assert per_gpu == [2 * timeline._LAYERS] * support.SOME_RANKS
    for exchange in found:
        copies = trace.length(trace.union(exchange.copies))
        assert len(exchange.copies) >= support.SOME_RANKS - 1
        assert exchange.hidden_us > 0.25 * copies
