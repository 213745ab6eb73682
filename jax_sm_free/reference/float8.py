"""What a float8 wire makes of rows, in plain JAX: the formula in the docstring of `Config`.

Every step here is exact, or rounds as IEEE 754 says, however XLA compiles the program. XLA's own
float division does not round so: on GPUs it is off by up to two units in the last place, and
elsewhere XLA may turn a division by a constant into a product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_sm_free.wire_format import FLOAT8, WireFormat

# cc/wire_format.h has the same numbers.
MIN_AMAX = 1e-4
MAX_FLOAT8 = 448.0


def through_wire(x: Any, wire: WireFormat) -> Any:
    """What arrives where rows x were sent in a wire format."""
    return through_float8(x) if wire == FLOAT8 else x


@jax.custom_vjp
def through_float8(x: Array) -> Array:
    """What arrives where x was sent as float8. Its gradient is that of the identity.

    Args:
      x: bfloat16, float16 or float32 [T, hidden].

    Returns:
      Of x's shape and dtype.
    """
    num_tokens, hidden = x.shape
    num_groups = FLOAT8.num_scales(hidden)
    padding = num_groups * FLOAT8.scale_columns - hidden
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding)))
    groups = padded.reshape(num_tokens, num_groups, FLOAT8.scale_columns)
    magnitude = jnp.abs(groups)
    amax = magnitude.max(axis=-1, keepdims=True)
    scale = _divide(jnp.maximum(amax, MIN_AMAX), jnp.full_like(amax, MAX_FLOAT8))
    arrived = _round_to_float8(_divide(magnitude, scale)) * scale
    arrived = jnp.where(jnp.signbit(groups), -arrived, arrived).astype(x.dtype)
    finite = jnp.isfinite(groups).all(axis=-1, keepdims=True)
    arrived = jnp.where(finite, arrived, jnp.asarray(jnp.nan, x.dtype))
    return arrived.reshape(padded.shape)[:, :hidden]


def _identity_fwd(x: Array) -> Any:
    return through_float8(x), None


through_float8.defvjp(_identity_fwd, lambda _, grad: (grad,))


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _divide(a: Array, b: Array) -> Array:
    """Divides in IEEE float32: a >= 0 by a normal b > 0, both finite.

    Where the quotient is below 2**-100, the result is some number below 2**-100, because float8
    rounds both to zero.
    """
    a, b = _bits(a), _bits(b)
    ma, mb = (bits & 0x7FFFFF | 0x800000 for bits in (a, b))  # 24-bit mantissas
    shift = jnp.where(ma < mb, 24, 23)  # makes the quotient of the mantissas one of 24 bits
    guess = _roughly_divide(ma.astype(jnp.float32), mb.astype(jnp.float32))
    guess = (guess * jnp.where(ma < mb, 2.0**24, 2.0**23)).astype(jnp.int32)
    # The remainder is small, so that arithmetic modulo 2**32 has it exactly. A quotient is never a
    # tie.
    remainder = (ma << shift) - guess * mb
    quotient = guess + (2 * remainder + mb) // (2 * mb)
    exponent = (a >> 23) - (b >> 23) - shift + 150
    # A quotient that was rounded up to 25 bits carries into the exponent.
    return _from_bits(jnp.where(exponent < 27, 0, (exponent << 23) + quotient - 0x800000))


def _roughly_divide(a: Array, b: Array) -> Array:
    return a / b


def _round_to_float8(x: Array) -> Array:
    """The nearest float8_e4m3fn, ties to even, of 0 <= x < 464; still in float32."""
    exponent = jnp.maximum(_bits(x) >> 23, 127 - 6)  # subnormals are spaced as the least normals
    spacing = exponent - 3
    steps = lax.round(x * _from_bits((254 - spacing) << 23), lax.RoundingMethod.TO_NEAREST_EVEN)
    return steps * _from_bits(spacing << 23)
