#!/usr/bin/env bash
# JAX refuses the gradient of a pipeline's stage, if the stage has a gradient rule of its own.
#
# Guessed: jax.vmap(shard_map(f), in_axes=(0, None), spmd_axis_name="stage"), which pipelines are
# written with, has the same gradients for a product and for a custom_vjp of the same product.
# Seen: jax 0.10.2, 0.11.2 and 0.12.0 on CPU. The product has them. With the custom_vjp and
# check_vma=True, the gradient to the operand that is not mapped raises ValueError "Expected cotangent
# type float32[2]{V:x} but got float32[2]{V:(stage,x)}": the rule's result varies over the stages, and
# nothing sums it over them. It works where both operands are mapped, and with check_vma=False.
#
# Needs PyPI and Python 3.11 and 3.12. It fails if what was seen has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/stages.py" <<'PROGRAM'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("stage", "x"))


def product(a, b):
    return a * b


with_rule = jax.custom_vjp(product)
with_rule.defvjp(lambda a, b: (a * b, (a, b)), lambda kept, ct: (ct * kept[1], ct * kept[0]))


def seen(f, check_vma, b):
    one = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma)
    stages = jax.vmap(one, in_axes=(0, 0 if b.ndim == 2 else None), spmd_axis_name="stage")
    grads = jax.jit(jax.grad(lambda a, b: stages(a, b).sum(), argnums=(0, 1)))
    try:
        return "right" if all(g.sum() == 8 for g in grads(jnp.ones((2, 4)), b)) else "wrong"
    except ValueError as error:
        return "refused" if "Expected cotangent type" in str(error) else "other"


shared, of_each = jnp.ones(4), jnp.ones((2, 4))
print(seen(product, True, shared), seen(with_rule, True, shared), end=" ")
print(seen(with_rule, True, of_each), seen(with_rule, False, shared))
PROGRAM

fail=0
for version in 0.10.2:python3.11 0.11.2:${PYTHON:-python3.12} 0.12.0:${PYTHON:-python3.12}; do
  jax=${version%%:*}
  "${version#*:}" -m venv "$folder/$jax"
  "$folder/$jax/bin/pip" install -q --disable-pip-version-check "jax==$jax"
  seen=$("$folder/$jax/bin/python" "$folder/stages.py")
  echo "jax $jax: product, with a rule, both mapped, without check_vma: $seen"
  [[ $seen == "right refused right right" ]] || { echo "changed"; fail=1; }
done
exit $fail
