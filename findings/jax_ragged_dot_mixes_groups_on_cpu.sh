#!/usr/bin/env bash
# jax.lax.ragged_dot on CPU lets a NaN in one group's matrix reach the rows of all groups.
#
# Guessed: a row of ragged_dot depends on its own group's matrix alone, as the documentation's loop
# over groups has it: result[rows of g] = lhs[rows of g] @ rhs[g].
# Seen: jax 0.10.2, 0.11.2 and 0.12.0.1 on CPU, jitted or not: with a NaN or an infinity in the
# matrix of the second group, the rows of the first are NaN as well. XLA expands the operation to one
# dense product over all groups, of rows that it masks with zeros, and zero times NaN is NaN. So one
# expert of a mixture that diverges makes every token's row NaN on CPU.
#
# Needs PyPI and Python 3.11 and 3.12. It fails if what was seen has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/rows.py" <<'PROGRAM'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp

sizes = jnp.array([2, 2], jnp.int32)
for value in (jnp.nan, jnp.inf):
    matrices = jnp.ones((2, 3, 5)).at[1, 0, 0].set(value)
    rows = jax.jit(jax.lax.ragged_dot)(jnp.ones((4, 3)), matrices, sizes)
    print(int(jnp.isnan(rows[:2]).any(1).sum()), end=" ")
PROGRAM

fail=0
for version in 0.10.2:python3.11 0.11.2:${PYTHON:-python3.12} 0.12.0:${PYTHON:-python3.12}; do
  jax=${version%%:*}
  "${version#*:}" -m venv "$folder/$jax"
  "$folder/$jax/bin/pip" install -q --disable-pip-version-check "jax==$jax"
  seen=$("$folder/$jax/bin/python" "$folder/rows.py")
  echo "jax $jax: rows of the first group that are NaN, with NaN and with infinity in the second: $seen"
  [[ $seen == "2 2 " ]] || { echo "changed: expected 2 2"; fail=1; }
done
exit $fail
