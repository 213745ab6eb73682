"""What `smf.inspect` says of calls that stand in a program more often than they should."""

from __future__ import annotations

from hlo_text import LOOP, STATE, computation, entry, module, recv, send, while_loop

import jax_sm_free as smf


def names(steps: tuple[smf.Step, ...]) -> list[str]:
    return [step.name for step in steps]


def test_a_recv_beside_its_clone_in_a_fusion() -> None:
    """As XLA:GPU of jaxlib 0.11.2 leaves a call that it has fused with slices."""
    clone = computation("clone", recv("r2", "clone.p"), parameter="f32[8]")
    lines = (
        send("s"),
        recv("r1", "s"),
        "%f = (f32[4,4], s32[2]) fusion(%s), kind=kCustom, calls=%clone",
    )
    schedule = smf.inspect(module(clone, entry(*lines)))
    assert names(schedule.repeated) == ["r1", "r2"]
    assert schedule.counts == {"dispatch_send": 1, "dispatch_recv": 2}
    assert not schedule.unmatched
    assert str(schedule).count("REPEATED") == 2


def test_recvs_of_two_branches_are_not_repeated() -> None:
    branches = [
        computation(name, recv(f"{name}.r", f"{name}.p"), parameter="f32[8]")
        for name in ("left", "right")
    ]
    lines = (
        send("s"),
        "%i = s32[] constant(0)",
        "%o = f32[8] conditional(%i, %s, %s), branch_computations={%left, %right}",
    )
    schedule = smf.inspect(module(*branches, entry(*lines)))
    assert not schedule.repeated
    assert schedule.counts["dispatch_recv"] == 2


def test_recv_of_a_loop_and_the_one_behind_it_are_not_repeated() -> None:
    """The token is carried from round to round; the last one is received behind the loop."""
    loop = while_loop(
        "%x = f32[4,4] get-tuple-element(%body.p), index=0",
        "%before = f32[8] get-tuple-element(%body.p), index=1",
        recv("br", "before"),
        send("bs", rows="x"),
        "%n = (f32[4,4], f32[8]) tuple(%x, %bs)",
    )
    last = "%last = f32[8] get-tuple-element(%loop), index=1"
    schedule = smf.inspect(module(*loop, entry(send("s"), STATE, LOOP, last, recv("r", "last"))))
    assert not schedule.repeated


def test_two_recvs_in_one_round_of_a_loop() -> None:
    loop = while_loop(
        "%x = f32[4,4] get-tuple-element(%body.p), index=0",
        send("bs", rows="x"),
        recv("r1", "bs"),
        recv("r2", "bs"),
        "%n = (f32[4,4], f32[8]) tuple(%x, %bs)",
    )
    schedule = smf.inspect(module(*loop, entry("%s = f32[8] constant({...})", STATE, LOOP)))
    assert names(schedule.repeated) == ["r1", "r2"]


def test_an_operation_that_stands_twice_in_one_place() -> None:
    lines = (send("s1"), recv("r1", "s1"), send("s2"), recv("r2", "s2"))
    schedule = smf.inspect(module(entry(*lines)))
    assert [names(copies) for copies in schedule.copied] == [["s1", "s2"]]
    assert not schedule.repeated
    assert "2 calls in the program of jit(f)/smf_dispatch_send" in str(schedule)


def test_calls_of_two_buffers_are_no_copies() -> None:
    schedule = smf.inspect(module(entry(send("s", buffer=1), send("t", buffer=2))))
    assert not schedule.copied
