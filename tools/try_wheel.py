"""A small exchange on CPU devices with the package that is installed, built for GPUs too."""

import importlib.util
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np

import jax_sm_free as smf
from jax_sm_free import _cuda

P = jax.sharding.PartitionSpec
T, H, K = 6, 7, 2


def main():
    package = pathlib.Path(smf.__file__).parent
    assert "site-packages" in package.parts, f"not the installed package: {package}"
    assert pathlib.Path(_cuda.__file__).parent == package
    assert importlib.util.find_spec("jax_plugins") is None, "a plugin for GPUs is installed"

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
    x = jnp.arange(4.0 * T * H).reshape(4 * T, H)
    topk_idx = (jnp.arange(4 * T * K, dtype=jnp.int32) * 3 % 8).reshape(4 * T, K)
    weights = jnp.full(topk_idx.shape, 0.5)
    with smf.Buffer(
        mesh, "ep", hidden=H, num_experts=8, top_k=K, max_tokens=T, dtype=jnp.float32
    ) as buffer:

        def layer(x, topk_idx, weights):
            recv = buffer.dispatch(x, topk_idx, weights)
            return buffer.combine(recv.x, recv.layout, weights=recv.weights)

        run = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        np.testing.assert_array_equal(run(x, topk_idx, weights), x)
        buffer.check()
    print(f"{package}: built for GPUs, runs without CUDA")


if __name__ == "__main__":
    main()
