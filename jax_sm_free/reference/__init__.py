"""The contract in plain JAX: what every transport must return, with no custom call.

The reference is slow and simple. The tests compare with it, and it is the place to read what each
operation means. `Buffer` and `overlap` here take the place of those in `jax_sm_free`: a program
runs on either.

The reference differs from the real implementation in three ways. Nothing overlaps. A sent value may
be used any number of times. And an index outside [-1, num_experts) selects no expert, where the
real implementation reports a fault. XLA:CPU flushes denormal numbers to zero, so sums below the
smallest normal number are zero.
"""

from jax_sm_free.reference.buffer import Buffer, overlap

__all__ = ["Buffer", "overlap"]
