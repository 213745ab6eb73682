"""What `jax.export` has to be told of our calls."""

from __future__ import annotations

from jax import export

from jax_sm_free.primitives import OP_NAMES


def export_checks() -> list[export.DisabledSafetyCheck]:
    """The checks of `jax.export` to turn off for a program with our ops. Not collective.

    `jax.export` refuses custom calls that it does not know, because they may change. Ours stay
    compatible within a minor version of jax_sm_free.

        exported = jax.export.export(jax.jit(step), disabled_checks=smf.export_checks())(*args)

    Returns:
      The value for `disabled_checks` of `jax.export.export`.
    """
    return [export.DisabledSafetyCheck.custom_call(f"smf_{name}") for name in OP_NAMES]
