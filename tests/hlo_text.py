"""HLO text of schedules written by hand, for tests of `smf.inspect`."""

from __future__ import annotations

import textwrap

HEADER = "HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,4]{1,0})->f32[8]{0}}"
TYPED = "custom_call_has_side_effect=true, api_version=API_VERSION_TYPED_FFI"


def computation(name: str, *lines: str, entry: bool = False, parameter: str = "f32[4,4]") -> str:
    """HLO text of a computation of one parameter p, whose last line is its result."""
    body = [f"%{name}.p = {parameter} parameter(0)", *lines]
    body[-1] = f"ROOT {body[-1]}"
    head = f"{'ENTRY ' if entry else ''}%{name} (p: {parameter}) -> f32[8] {{"
    return "\n".join([head, textwrap.indent("\n".join(body), "  "), "}", ""])


def entry(*lines: str) -> str:
    return computation("main", *lines, entry=True)


def module(*computations: str) -> str:
    return "\n\n".join([HEADER, *computations])


def send(name: str, op: str = "dispatch_send", buffer: int = 1, rows: str = "main.p") -> str:
    return (
        f'%{name} = f32[8]{{0}} custom-call(%{rows}), custom_call_target="smf_{op}", {TYPED}, '
        f'metadata={{op_name="jit(f)/smf_{op}" stack_frame_id=3}}, '
        f'backend_config={{buffer = "axes ep #{buffer}"}}'
    )


def recv(name: str, token: str, op: str = "dispatch_recv", buffer: int = 1) -> str:
    return (
        f"%{name} = (f32[4,4]{{1,0}}, /*index=1*/s32[2]{{0}}) custom-call(%{token}), "
        f'custom_call_target="smf_{op}", {TYPED}, backend_config={{buffer = "axes ep #{buffer}"}}'
    )


def forward(
    name: str, token: str, op: str = "dispatch_forward", buffer: int = 1
) -> tuple[str, str]:
    """A forward, and the part of its results that is the token."""
    return (
        f"%{name} = (f32[8]{{0}}, s32[4,2]{{1,0}}) custom-call(%{token}), "
        f'custom_call_target="smf_{op}", {TYPED}, backend_config={{buffer = "axes ep #{buffer}"}}',
        f"%{name}.t = f32[8]{{0}} get-tuple-element(%{name}), index=0",
    )


def dot(name: str) -> str:
    return (
        f"%{name} = f32[4,4]{{1,0}} dot(%main.p, %main.p), lhs_contracting_dims={{1}}, "
        f'rhs_contracting_dims={{0}}, metadata={{op_name="jit(f)/dot_general"}}'
    )


def while_loop(*lines: str) -> tuple[str, str]:
    """A loop's body and condition, whose state is its parameter."""
    return (
        computation("body", *lines, parameter="(f32[4,4], f32[8])"),
        computation("cond", "%cond.r = pred[] constant(true)", parameter="(f32[4,4], f32[8])"),
    )


LOOP = "%loop = (f32[4,4], f32[8]) while(%t), condition=%cond, body=%body"
STATE = "%t = (f32[4,4], f32[8]) tuple(%main.p, %s)"
