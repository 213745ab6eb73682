"""Opening over places as they are: bridges, dead ends, little of what the system gives; forks."""

from __future__ import annotations

import dataclasses
import os

import layers
import opening
import pytest
from support import assert_matches

from processes import launcher

pytestmark = pytest.mark.cpu_only

# Of devices that are equally fast UCX takes the first by name; the cable is another.
BRIDGE = ("br0", ["172.17.0.1/16", "172.17.0.1/16"])
SECOND_NETWORKS = [
    ("aa", ["10.99.0.1/24", "10.99.0.2/24"]),
    ("zz", ["10.99.0.1/24", "10.99.0.2/24"]),
]


def changed(script):
    """A host after `script`, with mounts and System V memory of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    inner = f'{script} && exec "$@"'
    return [launcher.Host(("unshare", "--mount", "--ipc", "sh", "-c", inner, "sh"))]


# ------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("dead_end", [BRIDGE, *SECOND_NETWORKS], ids=lambda d: d[0])
def test_a_network_that_leads_nowhere_is_left_out(hosts, dead_end):
    hosts.add_dead_end(*dead_end)
    for texts in launcher.run(opening.open_and_log, num_processes=2, hosts=hosts.hosts):
        assert_matches("\n".join(texts), f"leaves out {dead_end[0]}: no other host answers there")


def test_processes_of_a_host_with_a_bridge_share_memory(hosts):
    """Of three processes the first and the last are on one host."""
    hosts.add_dead_end(*BRIDGE)
    here, there = hosts.hosts
    # With --ipc each process would have System V memory of its own.
    here = dataclasses.replace(here, prefix=tuple(w for w in here.prefix if w != "--ipc"))
    options = {"num_processes": 3, "hosts": (here, there), "env": {"UCX_LOG_LEVEL": "info"}}
    with launcher.start(layers.check_new_buffer, **options) as group:
        group.results()
        for number in (0, 2):
            assert_matches(group.log.of(number), r"am\(sysv/memory", r"am\(tcp/cable")


@pytest.mark.parametrize(
    ("dead_end", "is_silent", "seen"),
    [
        (BRIDGE, False, "Endpoint timeout"),
        (SECOND_NETWORKS[0], False, "Endpoint timeout"),
        (SECOND_NETWORKS[0], True, "no answer within 20 s"),
    ],
    ids=["refuses", "is not there", "is silent"],
)
def test_a_network_that_the_environment_chooses_is_named_where_it_fails(
    hosts, dead_end, is_silent, seen
):
    """When the buffer opens, and in all processes, whatever error UCX has there."""
    name, addresses = dead_end
    hosts.add_dead_end(name, addresses, is_silent)
    env = {"UCX_NET_DEVICES": name}
    options = {"num_processes": 2, "hosts": hosts.hosts, "env": env}
    for number, (error, seconds) in enumerate(launcher.run(opening.error_of_opening, **options)):
        assert seconds < 20.0 + layers.MARGIN_S
        there = addresses[1 - number].split("/")[0]
        assert_matches(
            error,
            rf"process {1 - number}: {seen}",
            rf"{hosts.hosts[1 - number].address}: .*cable 10\.77\.0\.\d answers by cable",
            rf"{name} {there} does not: ",
            "UCX_NET_DEVICES",
        )


def test_a_transport_that_the_environment_chooses_is_named_where_it_fails(hosts):
    options = {"num_processes": 2, "hosts": hosts.hosts, "env": {"UCX_TLS": "sm,self"}}
    for number, (error, _) in enumerate(launcher.run(opening.error_of_opening, **options)):
        assert_matches(error, rf"did not reach process {1 - number}: ", "UCX_TLS")


# --------------------------------------------------------------------------------------- limits


def test_further_buffers_take_few_descriptors():
    for counts in launcher.run(opening.count_descriptors, 4, num_processes=2):
        assert counts[-1] - counts[0] <= 3 * 4, counts


def test_a_process_that_may_open_few_files_is_named():
    here, there = launcher.run(opening.open_with_few_descriptors, num_processes=2)
    text = r"expected 20 free file descriptors .*, got \d+: \d+ are in use, and `ulimit -n` is \d+"
    assert_matches(there, text)
    assert_matches(here, f"process 1 could not: RuntimeError: {text}")


def test_little_of_dev_shm_is_enough():
    small = changed("mount -t tmpfs -o size=64k tmpfs /dev/shm")
    for counts in launcher.run(opening.count_descriptors, 2, num_processes=3, hosts=small):
        assert len(counts) == 2


def test_without_system_v_memory_processes_exchange_by_tcp_and_say_so():
    without = changed("echo 0 > /proc/sys/kernel/shmall")
    for texts in launcher.run(opening.open_and_log, num_processes=2, hosts=without):
        assert_matches("\n".join(texts), "exchange by TCP: .*System V .*kernel.shmmax")


# ---------------------------------------------------------------------------------------- forks


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_forked_child_leaves_its_parents_buffer_alone(num_processes):
    """Also if the child closes the buffer, or its Python exits."""
    devices = 3 - num_processes
    places = {"num_processes": num_processes, "num_devices": devices}
    statuses = launcher.run(opening.fork_between_runs, **places)
    assert statuses[0] == [0, 0, 0]
