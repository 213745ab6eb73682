"""The doctor in several processes, on one host and on two."""

from __future__ import annotations

import json
import re

import programs
import pytest

from processes import launcher

SMALL = ["--hidden=32", "--num_experts=16", "--top_k=2", "--max_tokens=16", "--probe_mib=1"]
pytestmark = pytest.mark.cpu_only


def examine(tmp_path, *flags, **options):
    """Exit status by process, what process 0 printed, and the findings by process."""
    path = tmp_path / "found.json"
    with launcher.start(
        "jax_sm_free.doctor",
        *SMALL,
        f"--json={path}",
        *flags,
        num_processes=2,
        num_devices=2,
        distributed=None,
        **options,
    ) as group:
        ended = group.wait()
    return [end.status for end in ended], ended[0].output, json.loads(path.read_text())


def test_ready(tmp_path):
    status, output, found = examine(tmp_path)
    assert status == [0, 0], output
    assert "over 4 rank(s) by transport 'ucx': the bits of jax_sm_free.reference" in output
    assert found["ready"]
    assert len(found["processes"]) == 2


def test_two_hosts(tmp_path, hosts):
    """The findings name each host, and say how few bytes the cable carries."""
    megabits = 200
    hosts.slow_down(megabits)
    status, output, found = examine(tmp_path, hosts=hosts.hosts)
    assert status == [0, 0], output
    for process, (host, findings) in enumerate(zip(hosts.hosts, found["processes"], strict=True)):
        devices = [finding for finding in findings if finding["topic"] == "devices"]
        assert devices[0]["text"].endswith(f"on {host.address}; 4 of 2 processes"), process
    # Two ranks of each host send two thirds of their rows over the cable, at 12.5 MB/s each.
    egress = re.search(r"(\S+) GB/s leave", output)[1]
    assert 0.005 < float(egress) < 2 * megabits / 8e3


def test_a_network_that_leads_nowhere(tmp_path, hosts):
    """The doctor says which network does not answer, without a run."""
    hosts.add_dead_end("br0", ["172.17.0.1/16", "172.17.0.1/16"])
    env = {"UCX_NET_DEVICES": "br0"}
    status, output, _ = examine(tmp_path, hosts=hosts.hosts, env=env)
    assert status == [1, 1], output
    text = r"^PROBLEM self-test +\[process 0\] .*did not reach process 1: .*cable \S+ answers by"
    assert re.search(text, output, re.M), output


def test_a_problem_of_one_is_the_status_of_all(tmp_path):
    """Process 1 finds a package libucx that is empty."""
    (tmp_path / "libucx").mkdir()
    (tmp_path / "libucx" / "__init__.py").touch()
    with_empty = ("sh", "-c", f'PYTHONPATH={tmp_path}:$PYTHONPATH exec "$@"', "sh")
    hosts = (launcher.Host(), launcher.Host(with_empty))
    status, output, found = examine(tmp_path, hosts=hosts)
    assert status == [1, 1], output
    assert not found["ready"]
    assert re.search(r"^PROBLEM UCX +\[process 1\] .*libucp.so.0", output, re.M)
    assert re.search(r"^PROBLEM self-test +\[process 0\] .*process 1 could not", output, re.M)


def test_one_that_says_nothing():
    with launcher.start(programs.gather_without_the_last, num_processes=3) as group:
        group[2].wait_for("silent")
        for rank in group[:2]:
            rank.wait_for(programs.rank.ENDED)
        group[2].resume()
        results = [end.result for end in group.wait()]
    for texts in results[:2]:
        assert texts[:2] == [["this is 0"], ["this is 1"]]
        assert "process 2 did not report within 1 s" in texts[2][0]
