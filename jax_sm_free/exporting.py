"""What `jax.export` has to be told of our calls."""

from __future__ import annotations

from jax import export

from jax_sm_free.primitives import OP_NAMES


def export_checks() -> list[export.DisabledSafetyCheck]:
    """The checks to turn off where a program with our ops is exported. Not collective.

    jax.export knows which custom calls of JAX stay compatible, and has no way to be told of others
    but this one. Ours stay so within a minor version of jax_sm_free.

        exported = jax.export.export(jax.jit(step), disabled_checks=smf.export_checks())(*args)

    Returns:
      For `disabled_checks` of `jax.export.export`.
    """
    return [export.DisabledSafetyCheck.custom_call(f"smf_{name}") for name in OP_NAMES]
