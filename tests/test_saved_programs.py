"""A program that was saved finds the buffer that it was made for, or says that there is none."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
import support

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(support.MAX_RANKS < 2, reason="needs two devices"),
]

HOW = ("executable", "export")


def run(what: str, how: str, folder: pathlib.Path, buffers: str, *changes: str) -> str:
    """What saved_programs.py prints last."""
    script = pathlib.Path(__file__).with_name("saved_programs.py")
    command = [sys.executable, str(script), what, how, str(folder), buffers, *changes]
    # A saved executable wants just as many devices as it was compiled for.
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(params=HOW)
def how(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_program_finds_its_buffer_in_another_process(how: str, tmp_path: pathlib.Path) -> None:
    """Also where buffers were opened in another order."""
    saved = run("save", how, tmp_path, "xy")
    assert saved.startswith("[[["), saved
    assert run("load", how, tmp_path, "yx") == saved


@pytest.mark.parametrize("change", ["num_experts=8", "max_tokens=3", "recv_capacity=5"])
def test_no_program_runs_on_a_buffer_of_other_sizes(change: str, tmp_path: pathlib.Path) -> None:
    run("save", "executable", tmp_path, "x")
    text = run("load", "executable", tmp_path, "x", change)
    assert "expected the buffer that this program was made for to be open: axes x of" in text
    key, value = change.split("=")
    assert f"{key}={value}" in text.partition("seen open buffers")[2], (
        f"expected the sizes of open buffers in: {text}"
    )


def test_no_program_runs_on_a_buffer_over_another_axis(tmp_path: pathlib.Path) -> None:
    run("save", "executable", tmp_path, "x")
    text = run("load", "executable", tmp_path, "y")
    assert "made for to be open: axes x of mesh (x=2, " in text
    assert "seen open buffers: axes y of mesh (x=2, " in text


def test_a_name_tells_equal_buffers_apart(tmp_path: pathlib.Path) -> None:
    saved = run("save", "executable", tmp_path, "n")
    assert run("load", "executable", tmp_path, "nx") == saved
    text = run("load", "executable", tmp_path, "x")
    assert "made for to be open: name mine, axes x" in text


def test_equal_buffers_are_found_by_their_order(tmp_path: pathlib.Path) -> None:
    saved = run("save", "executable", tmp_path, "xx")  # the second one
    assert run("load", "executable", tmp_path, "xx") == saved
    # This process never had a buffer of that number, but the only equal buffer does the same.
    assert run("load", "executable", tmp_path, "x") == saved
    assert "it is closed" in run("load", "executable", tmp_path, "x-")


@pytest.mark.cpu_only
@pytest.mark.parametrize("wire_dtype", [None, jnp.float8_e4m3fn])
def test_the_name_of_a_buffer_does_not_change_from_version_to_version(wire_dtype) -> None:
    """Programs that earlier versions saved have it in them."""
    config = support.make_config(2, wire_dtype=wire_dtype, dtype=jnp.float32)
    with support.open_buffer(config) as buffer:
        text, _, number = buffer.program_name.rpartition(" #")
    assert number.isdigit()
    assert text == (
        "axes ep of mesh (ep=2), transport in_process, ep_size=2, "
        f"num_experts={config.num_experts}, top_k={config.top_k}, max_tokens={config.max_tokens}, "
        f"recv_capacity={config.recv_capacity}, num_slots=2, expert_alignment=1, "
        f"row_bytes={4 * config.hidden}, expert_capacity=0, "
        f"float8_wire={wire_dtype is not None}, dtype=float32"
    )
