"""How many rows a rank has room for: by default, by a factor, and the warning of the default."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import sample_inputs
import support

import jax_sm_free as smf
from jax_sm_free import reference

SIZES = {"hidden": 7, "num_experts": 16, "top_k": 2, "max_tokens": 5, "dtype": "float32"}
needs_eight_ranks = pytest.mark.skipif(
    support.MAX_RANKS < 8, reason="on fewer ranks the default is not more than 4 times the load"
)


def config(ep_size: int = 4, **sizes: Any) -> smf.Config:
    return smf.Config(ep_size=ep_size, **(SIZES | sizes))


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({}, 4 * 5 * 2),
        ({"top_k": 3}, 4 * 5 * 3),
        ({"top_k": 6}, 4 * 5 * 4),  # four experts on a rank
        ({"num_experts": 4, "top_k": 4}, 4 * 5),
        ({"expert_alignment": 8}, 64),  # 40 rows, and 7 for each of four groups: 68
        ({"num_experts": 4, "expert_alignment": 8}, 24),
        ({"ep_size": 1, "top_k": 32}, 5 * 16),
    ],
)
def test_the_default_is_the_worst_case_of_distinct_experts(
    sizes: dict[str, int], rows: int
) -> None:
    assert config(**sizes).recv_capacity == rows
    assert config(**sizes).worst_case_capacity == rows


@pytest.mark.parametrize(
    ("factor", "sizes", "rows"),
    [
        (1, {}, 10),
        (1.25, {}, 13),
        (1.1, {}, 11),
        (1.1, {"max_tokens": 25}, 55),  # not the 56 of math.ceil(1.1 * 50)
        (np.float32(1.1), {}, 11),
        (1e-9, {}, 1),
        (1.25, {"expert_alignment": 8}, 16),
        (4.5, {}, 40),  # never above the worst case
        (1e300, {"expert_alignment": 8}, 64),
    ],
)
def test_a_factor_of_the_balanced_load(factor: Any, sizes: dict[str, int], rows: int) -> None:
    got = config(**sizes, capacity_factor=factor)
    assert got.balanced_load == 2 * sizes.get("max_tokens", 5)
    assert got.recv_capacity == rows
    assert got == config(**sizes, recv_capacity=rows)
    assert smf.estimate_memory(got) == smf.estimate_memory(config(**sizes, recv_capacity=rows))


@pytest.mark.parametrize("module", [smf, reference])
def test_buffers_take_a_factor(module: Any) -> None:
    mesh = support.mesh_of(support.SOME_RANKS)
    with module.Buffer(mesh, "ep", **SIZES, capacity_factor=1.5) as buffer:
        assert buffer.config == config(support.SOME_RANKS, capacity_factor=1.5)
        assert buffer.config.recv_capacity == min(15, buffer.config.worst_case_capacity)


@pytest.mark.parametrize("module", [smf, reference])
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"capacity_factor": 0}, ValueError, r"capacity_factor must be .* above 0, got 0"),
        ({"capacity_factor": -1.5}, ValueError, r"above 0, got -1.5"),
        ({"capacity_factor": float("nan")}, ValueError, r"above 0, got nan"),
        ({"capacity_factor": float("inf")}, ValueError, r"a finite number above 0, got inf"),
        ({"capacity_factor": "1"}, TypeError, r"must be a number above 0, got '1'"),
        ({"capacity_factor": True}, TypeError, r"must be a number above 0, got True"),
        (
            {"capacity_factor": 1.5, "recv_capacity": 7},
            ValueError,
            r"capacity_factor or recv_capacity, got capacity_factor=1.5 and recv_capacity=7",
        ),
        (
            {"capacity_factor": 2, "expert_capacity": 3},
            ValueError,
            r"capacity_factor or expert_capacity, got capacity_factor=2 and expert_capacity=3",
        ),
    ],
)
def test_factors_are_checked(module: Any, sizes: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        module.Buffer(support.mesh_of(support.SOME_RANKS), "ep", **SIZES, **sizes)


def test_a_changed_config_keeps_its_rows() -> None:
    made = config(capacity_factor=1.5)
    assert dataclasses.replace(made, hidden=9).recv_capacity == 15
    with pytest.raises(ValueError, match=r"got capacity_factor=2 and recv_capacity=15"):
        dataclasses.replace(made, capacity_factor=2)
    assert dataclasses.replace(made, recv_capacity=None, capacity_factor=2).recv_capacity == 20


# Experts of a rank fewer than a token names, so that the default has no room for a repeated one.
FEW = support.make_config(num_experts=2 * support.SOME_RANKS, top_k=4)


def received(api: support.Api, *args: Any) -> Any:
    return api.buffer.dispatch(*args)


def test_the_default_holds_all_that_distinct_experts_can_bring() -> None:
    """Every token of every rank names both experts of the last rank: all rows are taken."""
    x, topk_idx, weights = sample_inputs.make_inputs(FEW)
    topk_idx[:] = [-1, FEW.num_experts - 1, -1, FEW.num_experts - 2]
    recv = support.check_same(FEW, received, x, topk_idx, weights)
    assert not np.asarray(recv.dropped).any()
    assert np.asarray(recv.group_sizes)[-1].sum() == FEW.recv_capacity
    assert np.asarray(recv.x)[-1].any(axis=1).all()


def test_by_default_repeated_experts_are_cut_and_counted() -> None:
    """Every token names the last expert four times: half of the rows have room."""
    x, topk_idx, weights = sample_inputs.make_inputs(FEW, seed=1)
    topk_idx[:] = FEW.num_experts - 1
    recv = support.check_same(FEW, received, x, topk_idx, weights)
    tokens = FEW.ep_size * FEW.max_tokens
    assert np.asarray(recv.counts)[-1, -1] == 4 * tokens
    assert np.asarray(recv.dropped)[-1] == 2 * tokens
    assert np.asarray(recv.dropped).sum() == 2 * tokens


# ------------------------------------------------------------------------------------- the warning


def opened(**sizes: Any) -> list[warnings.WarningMessage]:
    """The warnings of opening a buffer of eight ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        smf.Buffer(support.mesh_of(8), "ep", **(SIZES | sizes)).close()
    return caught


@needs_eight_ranks
def test_a_default_of_more_than_four_times_the_load_warns_its_caller() -> None:
    (warning,) = opened(hidden=2**20)
    assert warning.category is UserWarning
    assert pathlib.Path(warning.filename) == pathlib.Path(__file__)
    text = str(warning.message)
    assert text.startswith("jax_sm_free: recv.x has room for the worst case, 80 rows (0.312 GiB),")
    assert "8 times the balanced load of 10 rows (0.0391 GiB)" in text
    assert "capacity_factor=1.25" in text
    assert "recv_capacity=80" in text


@needs_eight_ranks
@pytest.mark.parametrize(
    "sizes",
    [
        {"capacity_factor": 8},
        {"recv_capacity": 80},
        {"expert_capacity": 80},
        {"num_experts": 8},  # the default is four times the load
    ],
)
def test_sizes_that_somebody_chose_do_not_warn(sizes: dict[str, int]) -> None:
    assert not opened(**sizes)


@needs_eight_ranks
def test_each_place_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            smf.Buffer(support.mesh_of(8), "ep", **SIZES).close()
        smf.Buffer(support.mesh_of(8), "ep", **SIZES).close()
    assert len(caught) == 2
    assert caught[1].lineno == caught[0].lineno + 1


@needs_eight_ranks
def test_configs_and_the_reference_do_not_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config(8)
        reference.Buffer(support.mesh_of(8), "ep", **SIZES)
    assert not caught
