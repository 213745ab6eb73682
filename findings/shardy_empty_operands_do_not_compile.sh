#!/usr/bin/env bash
# A shard_map does not compile if it has two or more operands and all that it uses are empty.
#
# Guessed: a jitted shard_map over arrays without rows compiles like any other, and runs.
# Seen: jax 0.10.2, 0.11.2 and 0.12.0 on CPU. With two operands of zero rows, both used, compiling ends
# with "'func.call' op expected at least one operand of @xla.sdy.manual_computation_body.1 to be
# produced by a xla.sdy.GlobalToLocalShape CustomCallOp". No side effect is needed: a sum of each does.
# Empty arrays become constants, and the body is left without an operand. It compiles where there is
# one operand alone. With 0.10.2 and 0.12.0 it also compiles with a further operand that is not empty,
# if the body uses it; one that is not used does not help.
#
# Needs PyPI and Python 3.11 and 3.12. It fails if what was seen has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/empty.py" <<'PROGRAM'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("x",))
empty, rows = jnp.zeros((0, 4)), jnp.ones((2, 4))


def seen(f, *args):
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    try:
        jax.block_until_ready(mapped(*args))
    except jax.errors.JaxRuntimeError as error:
        return "refused" if "'func.call' op expected at least one operand" in str(error) else "other"
    return "compiles"


print(seen(lambda a: jnp.ones(1) + a.sum(), empty), end=" ")
print(seen(lambda a, b: jnp.ones(1) + a.sum() + b.sum(), empty, empty), end=" ")
if jax.__version__ != "0.11.2":
    print(seen(lambda a, b, c: jnp.ones(1) + a.sum() + b.sum(), empty, empty, rows), end=" ")
    print(seen(lambda a, b, c: a.sum() + b.sum() + c, empty, empty, rows), end=" ")
PROGRAM

fail=0
for version in 0.10.2:python3.11 0.11.2:${PYTHON:-python3.12} 0.12.0:${PYTHON:-python3.12}; do
  jax=${version%%:*}
  "${version#*:}" -m venv "$folder/$jax"
  "$folder/$jax/bin/pip" install -q --disable-pip-version-check "jax==$jax"
  seen=$("$folder/$jax/bin/python" "$folder/empty.py")
  echo "jax $jax: one empty operand, two, two and a further one unused, two and one used: $seen"
  expected="compiles refused refused compiles "
  [[ $jax != 0.11.2 ]] || expected="compiles refused "
  [[ $seen == "$expected" ]] || { echo "changed: expected $expected"; fail=1; }
done
exit $fail
