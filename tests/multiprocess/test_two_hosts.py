"""Two hosts: the same training as in one process; a slow cable costs time alone; a cut one ends."""

from __future__ import annotations

import re
import time

import layers
import pytest
import tiers

from processes import launcher, pair

DEMO = launcher.ROOT / "examples" / "train_moe_lm.py"
# Small sizes: a test takes as long as compiling takes.
DEMO_FLAGS = (
    "--steps=4 --layers=1 --batch=8 --length=16 --hidden=32 --experts=8 --target=10 --noremat"
)
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"}
MEGABITS = 50
# A step of 2 MB takes a third of a second at 50 Mbit/s, so a cut falls into one.
TOKENS, HIDDEN = 512, 1024

pytestmark = [pytest.mark.cpu_only, pytest.mark.long]


def start_transfer(hosts, num_bytes, **options):
    port = launcher.free_port()
    return launcher.start(
        pair.transfer,
        port,
        num_bytes,
        num_processes=2,
        distributed=None,
        hosts=hosts.hosts,
        **options,
    )


def connect(group):
    group[0].wait_for("listens")
    group[1].wait_for("to connect")
    group[1].resume()


def test_cable_is_as_slow_as_told(hosts):
    hosts.slow_down(MEGABITS)
    num_bytes = 4 << 20
    expected = pytest.approx(num_bytes * 8 / (MEGABITS * 1e6), rel=0.25)
    seconds = []
    # A busy machine makes some transfers slower than the cable is, but none faster.
    for _ in range(5):
        with start_transfer(hosts, num_bytes) as group:
            connect(group)
            seconds.append(group.results()[0])
        if min(seconds) == expected:
            break
    assert min(seconds) == expected, seconds


def test_cable_is_cut_and_mended(hosts):
    hosts.slow_down(MEGABITS)
    with start_transfer(hosts, 8 << 20) as group:
        connect(group)
        group[0].wait_for("30 percent")
        hosts.cut()
        seen = group.log.settled(0)
        time.sleep(0.5)
        assert group.log.of(0) == seen
        hosts.mend()
        group.results()


def train(tmp_path, *, nodes=1, **options):
    """The last loss of the demo and that of its reference, as process 0 prints them."""
    with launcher.start(
        DEMO,
        *DEMO_FLAGS.split(),
        f"--nodes={nodes}",
        f"--out={tmp_path}",
        timeout_s=200.0,
        distributed=None,
        env=QUICK,
        **options,
    ) as group:
        group.results()
        output = group.log.of(0)
    losses = re.search(r"same parameters and batch: loss (\S+) and (\S+),", output).groups()
    assert "the same but for rounding" in output
    return [float(loss) for loss in losses]


def test_trains_as_in_one_process(hosts, tmp_path):
    """A slow cable between the hosts changes how long training takes, and not the losses."""
    want = train(tmp_path, num_processes=1, num_devices=4)
    hosts.slow_down(MEGABITS)
    got = train(tmp_path, num_processes=2, num_devices=2, hosts=hosts.hosts)
    assert got == pytest.approx(want, rel=1e-5)


def test_trains_with_hosts_as_nodes(hosts, tmp_path):
    hosts.slow_down(MEGABITS)
    got, of_reference = train(tmp_path, nodes=2, num_processes=2, num_devices=2, hosts=hosts.hosts)
    assert got == pytest.approx(of_reference, rel=1e-5)


def test_trains_with_two_nodes_in_one_process(tmp_path):
    got, of_reference = train(tmp_path, nodes=2, num_processes=1, num_devices=8)
    assert got == pytest.approx(of_reference, rel=1e-5)


def bytes_over_cable(hosts, node_axis):
    """What the first of two hosts with two ranks each sends in three dispatches to all ranks."""
    args = (3, TOKENS, HIDDEN, len(hosts.hosts), node_axis)
    with launcher.start(tiers.dispatch_to_all, *args, num_processes=4, hosts=hosts.hosts) as group:
        for rank in group:
            rank.wait_for("before")
        before = hosts.num_bytes()
        for rank in group:
            rank.resume()
        for rank in group:
            rank.wait_for("behind")
        num_bytes = hosts.num_bytes() - before
        for rank in group:
            rank.resume()
        group.results()
    return num_bytes


def test_in_two_tiers_a_token_crosses_the_cable_once(hosts):
    """And in one tier once for each rank of the other host."""
    once = 3 * 2 * TOKENS * HIDDEN * 4
    assert bytes_over_cable(hosts, "node") == pytest.approx(once, rel=0.1)
    assert bytes_over_cable(hosts, None) == pytest.approx(2 * once, rel=0.1)


def test_a_cut_ends_both_sides(hosts):
    timeout_s = 8.0
    hosts.slow_down(MEGABITS)
    with launcher.start(
        pair.exchange_for_ever,
        timeout_s,
        TOKENS,
        HIDDEN,
        num_processes=2,
        hosts=hosts.hosts,
    ) as group:
        for rank in group:
            rank.wait_for("step 2.")
        assert hosts.num_bytes() > 2 * TOKENS * HIDDEN * 4  # of the two steps before
        hosts.cut()
        cut = time.time()
        ended = group.wait(shutdown=False)  # JAX cannot shut down without the cable
    for number, end in enumerate(ended):
        assert end.status == 0, end.output
        at, text = end.result
        assert at - cut < timeout_s + layers.MARGIN_S
        assert f"rank {1 - number}" in text
