"""The names that `import jax_sm_free` gives, and how they may be called."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import warnings

import jax
import pytest
import support
from sample_inputs import make_inputs
from support import make_config

import jax_sm_free as smf
from jax_sm_free import reference

CONFIG = make_config(num_experts=2 * support.SOME_RANKS)


def test_the_package_docstring_names_all():
    names = set(smf.__all__) | {"python -m jax_sm_free.doctor"}
    assert not [name for name in names if f"`{name}`" not in smf.__doc__]


def test_the_reference_comes_with_the_package():
    program = """
import sys, jax_sm_free as smf
assert "jax_sm_free.reference" not in sys.modules, "most programs do without it"
assert "reference" in dir(smf)
smf.reference.Buffer, smf.reference.overlap
try:
    smf.no_such_name
except AttributeError as error:
    assert str(error) == "module 'jax_sm_free' has no attribute 'no_such_name'"
else:
    raise SystemExit("expected an AttributeError")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --------------------------------------------------------------------------------- from_config


@pytest.mark.parametrize("module", [smf, reference])
def test_a_buffer_of_a_config(module):
    mesh = support.mesh_of(CONFIG.ep_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Config says its recv_capacity
        with module.Buffer.from_config(mesh, "ep", CONFIG, transport="auto", name="n") as buffer:
            assert buffer.config is CONFIG
            assert type(buffer) is module.Buffer
            with module.Buffer.from_config(mesh, ("ep",), buffer.config) as other:
                assert other.axes == ("ep",)
    with pytest.raises(TypeError, match="from_config: expected a Config, got dict"):
        module.Buffer.from_config(mesh, "ep", vars(CONFIG))
    wrong = make_config(2 * CONFIG.ep_size, num_experts=2 * CONFIG.ep_size)
    with pytest.raises(ValueError, match=r"with ep_size=(\d), .*, got ep_size=(\d)"):
        module.Buffer.from_config(mesh, "ep", wrong)


def test_a_buffer_of_a_config_has_a_transport_and_a_name():
    mesh = support.mesh_of(CONFIG.ep_size)
    with smf.Buffer.from_config(mesh, "ep", CONFIG, name="a name") as buffer:
        assert buffer.name == "a name"
        assert "name a name, axes ep" in buffer.program_name
    with pytest.raises(ValueError, match=r"transport .*got 'pigeon'"):
        smf.Buffer.from_config(mesh, "ep", CONFIG, transport="pigeon")
    with pytest.raises(TypeError, match="expected name to be a string or None, got 3"):
        smf.Buffer.from_config(mesh, "ep", CONFIG, name=3)


# ---------------------------------------------------------------------- positions and keywords


@pytest.mark.parametrize("module", [smf, reference])
@pytest.mark.parametrize(
    "op",
    [
        *("dispatch", "dispatch_send", "dispatch_forward", "dispatch_recv"),
        *("combine", "combine_send", "combine_forward", "combine_recv"),
    ],
)
def test_all_arguments_of_an_op_go_by_position_and_by_keyword(module, op):
    parameters = list(inspect.signature(getattr(module.Buffer, op)).parameters.values())
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    ours = inspect.signature(getattr(smf.Buffer, op)).parameters
    assert [parameter.name for parameter in parameters] == list(ours)


def spelled(api, x, topk_idx, weights):
    """The same ops in all spellings."""
    buffer = api.buffer
    results = []
    for recv in (
        buffer.dispatch(x, topk_idx, weights, "experts", False),
        buffer.dispatch(topk_weights=weights, topk_idx=topk_idx, x=x, output="experts"),
        buffer.dispatch(x, topk_idx, weights, "experts", True)(),
    ):
        results += [
            recv.x,
            buffer.combine(recv.x, recv.layout, recv.weights),
            buffer.combine(y=recv.x, layout=recv.layout, weights=recv.weights),
            buffer.combine(recv.x, recv.layout, recv.weights, True)(),
            buffer.combine_recv(buffer.combine_send(recv.x, recv.layout, weights=recv.weights)),
        ]
    by_token = buffer.dispatch(x, topk_idx, weights, "tokens")
    sent = buffer.dispatch_send(x, topk_idx=topk_idx, topk_weights=weights)
    return results, by_token, buffer.dispatch_recv(sent=sent, output="tokens")


def test_all_spellings_give_the_same():
    config = dataclasses.replace(CONFIG, num_slots=16)  # XLA:CPU may run them all at once.
    results, by_token, by_keyword = support.check_same(config, spelled, *make_inputs(config))
    for more in (results[5:10], results[10:]):
        support.assert_same_bits(more, results[:5])
    support.assert_same_bits(results[2:5], [results[1]] * 3)
    support.assert_same_bits(jax.tree.leaves(by_token), jax.tree.leaves(by_keyword))
