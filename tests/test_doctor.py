"""The doctor: what each check finds, that a problem is seen, and the command in one process."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_sm_free
from jax_sm_free import reference
from jax_sm_free.doctor import exchange, libraries, machine, network, waits
from jax_sm_free.doctor.findings import Examination, note, ok, problem, report
from jax_sm_free.transports import nvshmem, ucx

SMALL = ["--hidden=32", "--num_experts=16", "--top_k=2", "--max_tokens=16", "--probe_mib=1"]
TOPICS = ["software", "devices", "peer access", "NVSHMEM", "UCX", "network", "memory", "bandwidth"]
TOPICS += ["self-test", "exchange"]


def has_two_nodes(num_ranks):
    """Whether the self-test also runs in two tiers, of two nodes."""
    return num_ranks >= 4 and num_ranks % 2 == 0


def texts(findings, level):
    return [finding.text for finding in findings if finding.level == level]


def run_doctor(*flags):
    root = pathlib.Path(jax_sm_free.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "jax_sm_free.doctor", *SMALL, *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command(tmp_path):
    path = tmp_path / "found.json"
    run = run_doctor(f"--json={path}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("\nready\n")
    found = json.loads(path.read_text())
    assert found["ready"]
    assert {finding["topic"] for finding in found["processes"][0]} >= set(TOPICS)
    assert f"3 rounds over {jax.device_count()} rank(s)" in run.stdout


@pytest.mark.skipif(jax.device_count() % 4 != 0, reason="needs four nodes")
def test_command_with_nodes():
    run = run_doctor("--num_nodes=4")
    assert run.returncode == 0, run.stdout + run.stderr
    ranks = jax.device_count()
    assert f"a rank of {ranks} on 4 nodes needs" in run.stdout
    assert f"in two tiers of 4 nodes x {ranks // 4}: the bits of" in run.stdout


def test_nodes_of_different_sizes_are_a_problem():
    run = run_doctor(f"--num_nodes={jax.device_count() + 1}")
    assert run.returncode == 1
    assert "must be divisible by num_nodes" in run.stdout


def test_a_problem_is_the_exit_status():
    run = run_doctor("--max_tokens=100000000", "--hidden=7168")
    assert run.returncode == 1
    assert "PROBLEM memory" in run.stdout
    assert "too little" in run.stdout
    assert run.stdout.endswith("not ready: 1 problem(s)\n")


def test_what_is_not_done_in_time():
    run = run_doctor("--timeout_s=0.01")
    assert run.returncode == 1
    assert "not done within 0.01 s" in run.stdout
    assert "Thread 0x" in run.stderr


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_meets_nobody(process):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"--coordinator_address=127.0.0.1:{port}"
    run = run_doctor(address, "--num_processes=2", f"--process_id={process}", "--timeout_s=2")
    assert run.returncode == 1
    assert "PROBLEM processes    not all of them met within 2 s" in run.stdout


def test_half_a_place_is_refused():
    run = run_doctor("--num_processes=2")
    assert run.returncode == 1
    assert "got none of JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID" in run.stderr


def test_what_a_check_raises_is_a_problem():
    def check():
        yield ok("so far")
        raise RuntimeError("it broke")

    examination = Examination()
    examination.run("some", check)
    examination.run("more", lambda: [note("went on")])
    assert [(f.level, f.topic, f.text) for f in examination.findings] == [
        ("ok", "some", "so far"),
        ("problem", "some", "RuntimeError: it broke"),
        ("note", "more", "went on"),
    ]


def test_report_says_once_what_all_found():
    examinations = [Examination() for _ in range(3)]
    for process, examination in enumerate(examinations):
        examination.add("first", ok("alike"))
        examination.add("second", problem("one\ntwo") if process else ok("well"))
    lines = report([examination.findings for examination in examinations]).split("\n")
    assert [line.split() for line in lines] == [
        ["ok", "first", "alike"],
        ["ok", "second", "[process", "0]", "well"],
        ["PROBLEM", "second", "[process", "1,", "2]", "one"],
        ["two"],
        ["not", "ready:", "1", "problem(s)"],
    ]


class WrongOnce(reference.Buffer):
    """Changes the lowest bit of one number that one rank receives, in two tiers alone if told."""

    transport = "wrong"
    in_two_tiers_alone = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self):
        pass

    def dispatch(self, *args):
        recv = super().dispatch(*args)
        if self.in_two_tiers_alone and self.config.num_nodes == 1:
            return recv
        bits = jax.lax.bitcast_convert_type(recv.x[0, 0], jnp.uint32)
        wrong = jax.lax.bitcast_convert_type(bits ^ 1, jnp.float32)
        last = jax.lax.axis_index(self.axes) == self.config.ep_size - 1
        x = recv.x.at[0, 0].set(jnp.where(last, wrong, recv.x[0, 0]))
        return type(recv)(**{**vars(recv), "x": x})


def test_self_test_sees_one_wrong_bit(monkeypatch):
    ranks = jax.device_count()
    config = support.make_config(ranks, num_experts=2 * ranks)
    assert not texts(exchange.check_against_reference(config, 20.0), "problem")
    monkeypatch.setattr(exchange, "Buffer", WrongOnce)
    found = texts(exchange.check_against_reference(config, 20.0), "problem")
    assert len(found) == (2 if has_two_nodes(ranks) else 1)
    # What it makes of that row it sends back to others.
    assert all(f"{ranks - 1}] differ" in text for text in found)


@pytest.mark.skipif(not has_two_nodes(jax.device_count()), reason="needs two nodes of two ranks")
def test_self_test_runs_two_tiers(monkeypatch):
    ranks = jax.device_count()
    monkeypatch.setattr(exchange, "Buffer", WrongOnce)
    monkeypatch.setattr(WrongOnce, "in_two_tiers_alone", True)
    one, two = exchange.check_against_reference(support.make_config(ranks, num_experts=ranks), 20.0)
    assert one.level == "ok"
    assert "tiers" not in one.text
    assert two.level == "problem"
    assert f"in two tiers of 2 nodes x {ranks // 2}: rank(s)" in two.text


@pytest.mark.parametrize(
    ("ranks", "num_nodes", "checked"),
    [(1, 1, (1,)), (2, 1, (1,)), (4, 1, (1, 2)), (6, 3, (1, 3)), (7, 1, (1,)), (2, 2, (1, 2))],
)
def test_nodes_of_the_self_test(monkeypatch, ranks, num_nodes, checked):
    monkeypatch.setattr(exchange, "_compare", lambda config: config)
    config = support.make_config(ranks, num_experts=ranks, num_nodes=num_nodes)
    configs = list(exchange.check_against_reference(config, 20.0))
    assert tuple(config.num_nodes for config in configs) == checked


@pytest.mark.skipif(jax.device_count() == 1, reason="one rank sends nothing")
def test_exchange_counts_what_leaves(monkeypatch):
    """The run takes a microsecond. Of a mebibyte only whole tokens leave for each other rank."""

    def interval(run):
        run()
        return 1e-6

    monkeypatch.setattr(exchange, "interval", interval)
    config = support.make_config(jax.device_count(), num_experts=jax.device_count(), hidden=64)
    (text,) = texts(exchange.check_exchange(config, 1 << 20, 20.0), "ok")
    assert 1046 < float(re.search(r"(\S+) GB/s leave", text)[1]) <= 1048.58


@pytest.mark.skipif(jax.device_count() < 3, reason="needs three ranks")
def test_a_rank_that_the_others_wait_for_is_named(monkeypatch):
    dispatch = jax_sm_free.Buffer.dispatch

    def late_dispatch(buffer, x, *args):
        def on_host(x, rank):
            time.sleep(0.05 if rank == 2 else 0)
            return x

        x = jax.pure_callback(on_host, jax.typeof(x), x, jax.lax.axis_index(buffer.axes))
        return dispatch(buffer, x, *args)

    monkeypatch.setattr(jax_sm_free.Buffer, "dispatch", late_dispatch)
    config = support.make_config(jax.device_count(), num_experts=jax.device_count(), hidden=64)
    found = list(exchange.check_exchange(config, 1 << 14, 20.0))
    (text,) = texts(found, "note")
    assert text.startswith("the other ranks wait for rank 2: ")


@pytest.mark.parametrize(
    ("waited", "stands_out"),
    [
        ([[0, 1, 8], [1, 0, 9], [1, 1, 0]], "rank 2: 85% of the time, and 10% for the next"),
        ([[0, 6], [1, 0]], "rank 1: 60% of the time, and 10% for the next"),
        ([[0, 1, 9], [1, 0, 1], [1, 1, 0]], "rank 2: 50% of the time"),
        ([[0, 1, 2], [1, 0, 2], [1, 1, 0]], None),  # not for long
        ([[0, 4, 7], [1, 0, 7], [1, 4, 0]], None),  # another as well
    ],
)
def test_who_stands_out(waited, stands_out):
    found = texts(waits.who_stands_out(np.array(waited, float), 10.0), "note")
    assert len(found) == (stands_out is not None)
    assert not found or stands_out in found[0]


def test_an_exchange_takes_until_the_next_has_ended(monkeypatch):
    """Of two processes the later one finds half of what it waits for done, every other time."""
    now, lengths = 0.0, itertools.cycle([0.5, 1.5])

    def run():
        nonlocal now
        now += next(lengths)

    monkeypatch.setattr(exchange.time, "perf_counter", lambda: now)
    assert exchange.interval(run) == 1.0


class FakeDriver:
    """Three GPUs of 10 GiB, of which the last reaches only itself."""

    version = "13.0"

    def peer_access(self):
        return [[True, True, False], [True, True, False], [False, False, True]]

    def total_bytes(self, gpu):
        return 10 << 30


def with_gpus(monkeypatch, *gpus):
    devices = [types.SimpleNamespace(local_hardware_id=i, device_kind="fake") for i in gpus]
    monkeypatch.setattr(machine, "Driver", FakeDriver)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def test_peer_access(monkeypatch):
    with_gpus(monkeypatch, 0, 1)
    (matrix,) = machine.check_peer_access()
    assert [line.split() for line in matrix.text.split("\n")[1:]] == [
        ["0", "1", "2"],
        ["0", "-", "yes", "no"],
        ["1", "yes", "-", "no"],
        ["2", "no", "no", "-"],
    ]
    with_gpus(monkeypatch, 1, 2)
    (text,) = texts(machine.check_peer_access(), "problem")
    assert "from GPU 1 to 2, 2 to 1:" in text


def test_memory_of_gpus(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    with_gpus(monkeypatch, 0)
    sizes = {"num_experts": 8, "hidden": 1024, "top_k": 1, "recv_capacity": 0}
    assert not texts(machine.check_memory(support.make_config(4, **sizes)), "problem")
    # 2 slots x 7 messages x 2**16 rows of 4 KiB, about: 3.5 GiB, where XLA leaves 2.5.
    large = support.make_config(4, max_tokens=1 << 16, **sizes)
    assert len(texts(machine.check_memory(large), "problem")) == 1
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert not texts(machine.check_memory(large), "problem")


def write(path, **files):
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text + "\n")


def test_nics(tmp_path):
    (text,) = texts(network.check_nics(tmp_path), "note")[:1]
    assert text == "no network interface is up"
    write(tmp_path / "net" / "lo", operstate="unknown")
    write(tmp_path / "net" / "eth0", operstate="up", speed="100000")
    write(tmp_path / "net" / "eth1", operstate="down")
    write(tmp_path / "net" / "veth", operstate="up", speed="-1")
    (text,) = texts(network.check_nics(tmp_path), "ok")
    assert text == "network interfaces: eth0 (100000 Mbit/s), veth"
    port = {"link_layer": "InfiniBand", "rate": "400 Gb/sec (4X NDR)", "state": "4: ACTIVE"}
    write(tmp_path / "infiniband" / "mlx5_0" / "ports" / "1", **port)
    text = texts(network.check_nics(tmp_path), "ok")[1]
    assert text == "RDMA devices: mlx5_0 (InfiniBand 400 Gb/sec (4X NDR) 4: ACTIVE)"


def test_libraries_that_several_processes_need(monkeypatch):
    def is_not_there():
        raise ImportError("there is no such package")

    monkeypatch.setattr(nvshmem, "library", is_not_there)
    monkeypatch.setattr(ucx, "library", is_not_there)
    checks = {"cpu": libraries.check_ucx, "gpu": libraries.check_nvshmem}
    for platform, check in checks.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        for count in (1, 2):
            monkeypatch.setattr(jax, "process_count", lambda count=count: count)
            levels = [finding.level for finding in check()]
            assert levels == ["problem" if count > 1 else "note"]
