"""`smf.inspect` on hand-written schedules, and on what XLA:CPU compiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_text import (
    LOOP,
    STATE,
    computation,
    dot,
    entry,
    module,
    recv,
    send,
    while_loop,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_sm_free as smf

# ------------------------------------------------------------------------------ hand-written


def matched(schedule: smf.Schedule) -> dict[str, str | None]:
    return {pair.send.name: pair.recv and pair.recv.name for pair in schedule.pairs}


def between(schedule: smf.Schedule) -> dict[str, list[str]]:
    return {pair.send.name: [gemm.name for gemm in pair.gemms] for pair in schedule.pairs}


def test_gemm_between_send_and_recv() -> None:
    schedule = smf.inspect(module(entry(dot("a"), send("s"), dot("b"), recv("r", "s"), dot("c"))))
    assert [step.name for step in schedule.steps] == ["a", "s", "b", "r", "c"]
    assert matched(schedule) == {"s": "r"}
    assert between(schedule) == {"s": ["b"]}
    assert schedule.num_slots == 1
    assert schedule.steps[1].buffer == 0
    assert schedule.steps[1].op_name == "jit(f)/smf_dispatch_send"
    assert not schedule.unmatched


def test_interleaved_pairs_need_two_slots() -> None:
    schedule = smf.inspect(
        module(entry(send("s"), send("t"), dot("a"), recv("q", "t"), dot("b"), recv("r", "s")))
    )
    assert matched(schedule) == {"s": "r", "t": "q"}
    assert between(schedule) == {"s": ["a", "b"], "t": ["a"]}
    assert schedule.num_slots == 2


def test_slots_are_counted_for_each_buffer() -> None:
    lines = (send("s", buffer=1), send("t", buffer=-2), recv("q", "t", buffer=-2), recv("r", "s"))
    schedule = smf.inspect(module(entry(*lines)))
    assert schedule.num_slots == 1
    assert {step.buffer for step in schedule.steps} == {0, 1}


def test_unmatched_calls() -> None:
    schedule = smf.inspect(module(entry(send("s"), dot("a"), recv("r", "main.p"))))
    assert matched(schedule) == {"s": None}
    assert [step.name for step in schedule.unmatched] == ["s", "r"]
    assert str(schedule).count("UNMATCHED") == 2
    assert schedule.num_slots == 1


def test_token_passes_tuples_barriers_copies_and_async_calls() -> None:
    wrapped = computation("wrapped", "%inner = f32[8]{0} bitcast(%wrapped.p)", parameter="f32[8]")
    lines = (
        send("s"),
        "%t = (f32[4,4]{1,0}, f32[8]{0}) tuple(%main.p, %s)",
        "%b = (f32[4,4]{1,0}, f32[8]{0}) opt-barrier(%t)",
        "%g = f32[8]{0} get-tuple-element(%b), index=1",
        "%c = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%g)",
        "%d = f32[8]{0} copy-done(%c)",
        "%e = ((f32[8]{0}), f32[8]{0}, s32[]) async-start(%d), calls=%wrapped",
        "%u = ((f32[8]{0}), f32[8]{0}, s32[]) async-update(%e)",
        "%f = f32[8]{0} async-done(%u)",
        "%h = f32[8]{0} fusion(%f), kind=kLoop, calls=%wrapped",
        recv("r", "h"),
    )
    assert matched(smf.inspect(module(wrapped, entry(*lines)))) == {"s": "r"}


def test_asynchronous_calls_of_ours() -> None:
    start = send("s").replace(
        "f32[8]{0} custom-call", "((f32[4,4]), f32[8], s32[]) custom-call-start"
    )
    lines = (start, dot("a"), "%d = f32[8]{0} custom-call-done(%s)", recv("r", "d"))
    schedule = smf.inspect(module(entry(*lines)))
    assert matched(schedule) == {"s": "r"}
    assert between(schedule) == {"s": ["a"]}


def test_calls_fused_with_slices_of_their_operands() -> None:
    """As newer XLA:GPU does with calls that read what a scan has stacked."""
    sends = computation("sends", send("s", rows="sends.p"))
    recvs = computation("recvs", recv("r", "recvs.p"), parameter="f32[8]")
    lines = (
        "%f1 = f32[8]{0} fusion(%main.p), kind=kCustom, calls=%sends",
        dot("a"),
        "%f2 = (f32[4,4], s32[2]) fusion(%f1), kind=kCustom, calls=%recvs",
    )
    schedule = smf.inspect(module(sends, recvs, entry(*lines)))
    assert matched(schedule) == {"s": "r"}
    assert between(schedule) == {"s": ["a"]}
    assert all(step.callers == () for step in schedule.steps), (
        "expected no caller: a fusion is not a loop or a call"
    )


def test_wrong_tuple_element_is_no_token() -> None:
    lines = (
        send("s"),
        "%t = (f32[8]{0}, f32[8]{0}) tuple(%s, %main.p)",
        "%g = f32[8]{0} get-tuple-element(%t), index=1",
        recv("r", "g"),
    )
    assert matched(smf.inspect(module(entry(*lines)))) == {"s": None}


GEMM_LINES = {
    "fusion": "%x = f32[4,4] fusion(%main.p), kind=kCustom, calls=%fused",
    "nested fusion": "%x = f32[4,4] fusion(%main.p), kind=kCustom, calls=%outer",
    "cublas": '%x = (f32[4,4], s8[64]) custom-call(%main.p), custom_call_target="__cublas$gemm"',
    "cublaslt": '%x = f32[4,4] custom-call(%main.p), custom_call_target="__cublas$lt$matmul$f8"',
    "convolution": "%x = f32[4,4] convolution(%main.p, %main.p), dim_labels=bf_io->bf",
    "ragged-dot": "%x = f32[4,4] ragged-dot(%main.p, %main.p, %n)",
    "async": "%x = ((f32[4,4]), f32[4,4], s32[]) fusion-start(%main.p), kind=kCustom, calls=%fused",
}
OTHER_LINES = {
    "fusion": "%x = f32[4,4] fusion(%main.p), kind=kLoop, calls=%plain",
    "custom call": '%x = f32[4,4] custom-call(%main.p), custom_call_target="TopK"',
    "name": "%dot.1 = f32[4,4] add(%main.p, %main.p)",
}
CALLED = (
    computation("fused", "%fused.d = f32[4,4] dot(%fused.p, %fused.p)"),
    computation("outer", "%outer.f = f32[4,4] fusion(%outer.p), kind=kLoop, calls=%fused"),
    computation("plain", "%plain.a = f32[4,4] add(%plain.p, %plain.p)"),
)


@pytest.mark.parametrize("line", GEMM_LINES.values(), ids=GEMM_LINES)
def test_what_counts_as_gemm(line: str) -> None:
    schedule = smf.inspect(module(*CALLED, entry(send("s"), line, recv("r", "s"))))
    assert between(schedule) == {"s": ["x"]}


@pytest.mark.parametrize("line", OTHER_LINES.values(), ids=OTHER_LINES)
def test_what_does_not_count_as_gemm(line: str) -> None:
    schedule = smf.inspect(module(*CALLED, entry(send("s"), line, recv("r", "s"))))
    assert between(schedule) == {"s": []}


# ------------------------------------------------------------------- loops, calls, conditionals


def test_pair_within_a_loop_lies_within_it() -> None:
    loop = while_loop(
        "%x = f32[4,4] get-tuple-element(%body.p), index=0",
        send("bs", rows="x"),
        dot("bd"),
        recv("br", "bs"),
        "%n = (f32[4,4], f32[8]) tuple(%x, %bs)",
    )
    lines = (send("s"), STATE, LOOP, recv("r", "s"))
    schedule = smf.inspect(module(*loop, entry(*lines)))
    assert matched(schedule) == {"s": "r", "bs": "br"}
    assert between(schedule) == {"s": ["bd"], "bs": ["bd"]}
    assert schedule.pairs[1].send.callers == ("loop",)
    # The loop runs while the outer exchange is in flight.
    assert schedule.num_slots == 2, str(schedule)
    assert str(schedule).splitlines() == [
        "dispatch_send               s, buffer 0",
        "loop:",
        "  dispatch_send               bs, buffer 0",
        "    dot                       bd",
        "  dispatch_recv               br, buffer 0, of bs",
        "dispatch_recv               r, buffer 0, of s",
        "slots needed: 2",
    ]


def test_token_carried_to_the_next_round() -> None:
    loop = while_loop(
        "%x = f32[4,4] get-tuple-element(%body.p), index=0",
        "%before = f32[8] get-tuple-element(%body.p), index=1",
        dot("d1"),
        recv("br", "before"),
        dot("d2"),
        send("bs", rows="x"),
        dot("d3"),
        "%n = (f32[4,4], f32[8]) tuple(%x, %bs)",
    )
    lines = (
        send("s"),
        STATE,
        LOOP,
        "%last = f32[8] get-tuple-element(%loop), index=1",
        recv("r", "last"),
    )
    schedule = smf.inspect(module(*loop, entry(*lines)))
    assert matched(schedule) == {"s": "br", "bs": "br"}
    assert between(schedule) == {"s": ["d1"], "bs": ["d3", "d1"]}
    assert not schedule.unmatched, "the recv behind the loop receives what the last round sent"
    assert schedule.num_slots == 1


def test_token_passes_calls_and_conditionals() -> None:
    called = computation("callee", send("cs", rows="callee.p"))
    branches = [
        computation(name, recv(f"{name}.r", f"{name}.p"), parameter="f32[8]")
        for name in ("left", "right")
    ]
    lines = (
        "%c = f32[8] call(%main.p), to_apply=%callee",
        "%i = s32[] constant(0)",
        "%o = f32[8] conditional(%i, %c, %c), branch_computations={%left, %right}",
        send("s"),
        recv("r", "s"),
    )
    schedule = smf.inspect(module(called, *branches, entry(*lines)))
    assert matched(schedule) == {"cs": "left.r", "s": "r"}
    assert not schedule.unmatched
    assert schedule.num_slots == 1


def test_one_computation_called_twice() -> None:
    called = computation("callee", send("cs", rows="callee.p"), recv("cr", "cs"))
    lines = (
        "%c1 = f32[8] call(%main.p), to_apply=%callee",
        "%c2 = f32[8] call(%main.p), to_apply=%callee",
    )
    schedule = smf.inspect(module(called, entry(*lines)))
    assert [pair.send.callers for pair in schedule.pairs] == [("c1",), ("c2",)]
    assert [pair.recv.callers for pair in schedule.pairs if pair.recv] == [("c1",), ("c2",)]


# ------------------------------------------------------------------------------ what is refused


def test_program_without_our_calls_has_its_gemms() -> None:
    schedule = smf.inspect(module(entry(dot("a"))))
    assert [(step.kind, step.name) for step in schedule.steps] == [("gemm", "a")]
    assert (schedule.pairs, schedule.unmatched, schedule.num_slots) == ((), (), 0)
    assert smf.inspect(module(entry())).steps == ()


def test_program_without_schedule() -> None:
    text = module(entry(send("s"), recv("r", "s"))).replace(" is_scheduled=true,", "")
    with pytest.raises(ValueError, match="is_scheduled"):
        smf.inspect(text)


def test_what_is_not_a_compiled_program() -> None:
    with pytest.raises(ValueError, match="compile"):
        smf.inspect("module @jit_f {}")
    with pytest.raises(ValueError, match="compile"):
        smf.inspect(jax.jit(lambda x: x + 1).lower(1.0))
    with pytest.raises(TypeError, match="int"):
        smf.inspect(7)


# ------------------------------------------------------------------------------- compiled on CPU

T, H, E, TOP_K, NUM_LAYERS = 16, 8, 8, 2, 3


@pytest.fixture
def buffer() -> smf.Buffer:
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("ep",))
    return smf.Buffer(
        mesh, "ep", hidden=H, num_experts=E, top_k=TOP_K, max_tokens=T, dtype=jnp.float32
    )


def layer(buffer: smf.Buffer, w: Any, x: Any) -> Any:
    def mlp(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w)

    topk_idx = jnp.broadcast_to(jnp.arange(TOP_K, dtype=jnp.int32), (T, TOP_K))
    sent = buffer.dispatch_send(x, topk_idx, x[:, :TOP_K])
    a, sent = smf.overlap(sent, mlp, x, w)
    recv = buffer.dispatch_recv(sent)
    sent = buffer.combine_send(jnp.tanh(recv.x), recv.layout, weights=recv.weights)
    b, sent = smf.overlap(sent, mlp, a, w)
    return b + buffer.combine_recv(sent)


def compile_on_cpu(buffer: smf.Buffer, f: Any, out_specs: Any) -> Any:
    mapped = jax.shard_map(f, mesh=buffer.mesh, in_specs=(P(), P("ep")), out_specs=out_specs)
    w, x = jnp.ones((NUM_LAYERS, H, H)), jnp.ones((4 * T, H))
    return jax.jit(mapped).lower(w, x).compile()


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_scanned_gradient_on_cpu(buffer: smf.Buffer, remat: bool) -> None:
    def body(x: Any, w: Any) -> Any:
        return layer(buffer, w, x), None

    def loss(w: Any, x: Any) -> Any:
        y, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)
        return jax.lax.pmean(y.mean(), "ep")

    compiled = compile_on_cpu(buffer, jax.grad(loss, argnums=(0, 1)), (P(), P("ep")))
    schedule = smf.inspect(compiled)
    assert not schedule.unmatched, str(schedule)
    assert len(schedule.pairs) == (5 if remat else 4)
    for pair in schedule.pairs:
        assert pair.recv is not None
        assert pair.recv.op == pair.send.op.replace("send", "recv")
        assert pair.recv.buffer == pair.send.buffer
        assert len(pair.send.callers) == 1
        assert pair.recv.callers == pair.send.callers
    assert {step.kind for step in schedule.steps} == {"send", "recv", "gemm"}
    assert 1 <= schedule.num_slots <= 2
    assert smf.inspect(compiled.as_text()) == schedule


def test_program_of_two_buffers_on_cpu(buffer: smf.Buffer) -> None:
    other = smf.Buffer(
        buffer.mesh, "ep", hidden=H, num_experts=E, top_k=TOP_K, max_tokens=T, dtype=jnp.float32
    )

    def f(w: Any, x: Any) -> Any:
        return layer(buffer, w[0], x) + layer(other, w[1], x)

    schedule = smf.inspect(compile_on_cpu(buffer, f, P("ep")))
    assert len(schedule.pairs) == 4
    assert len({pair.send.buffer for pair in schedule.pairs}) == 2
    assert all(pair.recv and pair.recv.buffer == pair.send.buffer for pair in schedule.pairs)
