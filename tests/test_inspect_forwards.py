"""`smf.inspect` on hand-written schedules of two tiers, which have forwards."""

from __future__ import annotations

from hlo_text import LOOP, STATE, dot, entry, forward, module, recv, send, while_loop
from test_inspect import matched

import jax_sm_free as smf


def test_gemms_on_both_sides_of_a_forward() -> None:
    lines = (send("s"), dot("a"), *forward("f", "s"), dot("b"), dot("c"), recv("r", "f.t"))
    schedule = smf.inspect(module(entry(*lines)))
    (pair,) = schedule.pairs
    assert [step.kind for step in schedule.steps if step.kind != "gemm"] == [
        "send",
        "forward",
        "recv",
    ]
    assert pair.forward is not None
    assert (pair.send.name, pair.forward.name, pair.recv and pair.recv.name) == ("s", "f", "r")
    assert [gemm.name for gemm in pair.before] == ["a"]
    assert [gemm.name for gemm in pair.after] == ["b", "c"]
    assert pair.gemms == pair.before + pair.after
    assert schedule.counts == {"dispatch_send": 1, "dispatch_forward": 1, "dispatch_recv": 1}
    assert schedule.num_slots == 1
    assert not schedule.unmatched
    assert not schedule.repeated
    assert "smf" not in str(schedule)
    assert str(schedule).count("of s") == 2


def test_without_a_forward_all_gemms_come_before() -> None:
    schedule = smf.inspect(module(entry(send("s"), dot("a"), recv("r", "s"))))
    (pair,) = schedule.pairs
    assert pair.forward is None
    assert pair.before == pair.gemms
    assert len(pair.gemms) == 1
    assert not pair.after


def test_forwards_of_pairs_that_interleave() -> None:
    lines = (
        send("s"),
        send("t"),
        *forward("g", "t"),
        dot("a"),
        *forward("f", "s"),
        recv("q", "f.t"),
        dot("b"),
        recv("r", "g.t"),
    )
    schedule = smf.inspect(module(entry(*lines)))
    assert matched(schedule) == {"s": "q", "t": "r"}
    assert [pair.forward and pair.forward.name for pair in schedule.pairs] == ["f", "g"]
    assert [[gemm.name for gemm in pair.after] for pair in schedule.pairs] == [[], ["a", "b"]]
    assert schedule.num_slots == 2


def test_forwards_without_a_send_or_a_recv_are_unmatched() -> None:
    schedule = smf.inspect(module(entry(send("s"), *forward("f", "s"))))
    assert [step.name for step in schedule.unmatched] == ["s", "f"]
    schedule = smf.inspect(module(entry(*forward("f", "main.p"), recv("r", "f.t"))))
    assert [step.name for step in schedule.unmatched] == ["f", "r"]


def test_a_token_that_is_forwarded_twice_is_repeated() -> None:
    lines = (send("s"), *forward("f", "s"), *forward("g", "s"), recv("q", "f.t"), recv("r", "g.t"))
    schedule = smf.inspect(module(entry(*lines)))
    assert [step.name for step in schedule.repeated] == ["f", "g"]


def test_a_loop_that_forwards_what_its_last_round_sent() -> None:
    loop = while_loop(
        "%x = f32[8]{0} get-tuple-element(%body.p), index=1",
        dot("a").replace("main.p", "rows"),
        *forward("f", "x"),
        dot("b").replace("main.p", "rows"),
        recv("r", "f.t"),
        send("s2", rows="rows"),
        dot("c").replace("main.p", "rows"),
        "%next = (f32[4,4], f32[8]) tuple(%rows, %s2)",
    )
    schedule = smf.inspect(module(*loop, entry(send("s"), STATE, LOOP)))
    first, second = schedule.pairs
    assert first.forward is not None
    assert first.forward == second.forward
    assert [gemm.name for gemm in second.before] == ["c", "a"]
    assert [gemm.name for gemm in second.after] == ["b"]
