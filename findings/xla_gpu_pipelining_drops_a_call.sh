#!/usr/bin/env bash
# XLA:GPU's pipelining of all-gathers removes a custom call that has a side effect.
#
# Guessed: with pipelined all-gathers, a custom call with custom_call_has_side_effect=true that feeds
# an all-gather in a loop either stays where it is, or is copied with all that it depends on.
# Seen: jaxlib 0.10.2, 0.11.2 and 0.12.0.1. In a scan, `give` makes a token, `take` uses the token,
# and an all-gather gathers what `take` returns; nothing depends on the loop's state. XLA copies both
# calls into the iteration before, as it must. It leaves the original `give` in the loop, and removes
# the original `take`. So `give` runs twice as often as `take`, though both have side effects: calls
# that go in pairs are no longer paired. With an optimization barrier behind `take` both stay.
#
# This program compiles ahead of time for described H200s, so that it needs no GPU; it needs PyPI,
# Python 3.12 and a C++ compiler. It fails if what was seen has changed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/count.py" <<'PROGRAM'
import ctypes, os, pathlib, re, subprocess, sys, tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, jaxlib, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

SOURCE = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error Ok(ffi::RemainingArgs, ffi::RemainingRets) { return ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(Handler, Ok, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
"""
folder = pathlib.Path(tempfile.mkdtemp(dir=os.path.dirname(__file__)))
(folder / "calls.cc").write_text(SOURCE)
subprocess.check_call(["g++", "-std=c++17", "-shared", "-fPIC", "-I", jax.ffi.include_dir(),
                       "-o", folder / "calls.so", folder / "calls.cc"])
library = ctypes.CDLL(str(folder / "calls.so"))
for name in ("give", "take"):
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.Handler), platform="CUDA")

UNKNOWN_TO_OLD = re.compile(r"^\s*(mem_clock_ghz|reserved_shared_memory_per_block"
                            r"|max_blocks_per_multiprocessor|collective_memory_granularity):.*\n", re.M)
target = UNKNOWN_TO_OLD.sub("", pathlib.Path(sys.argv[1]).read_text())
topology = topologies.get_topology_desc("", platform="cuda", target_config=target, topology="1x1x2")
mesh = Mesh(np.array(topology.devices), ("x",))

rows = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
give = jax.ffi.ffi_call("give", jax.ShapeDtypeStruct((8,), jnp.float32), has_side_effect=True)
take = jax.ffi.ffi_call("take", rows, has_side_effect=True)


def program(weights, x, hold):
    def step(state, weight):
        taken = take(give(x * weight))
        if hold:
            taken = jax.lax.optimization_barrier(taken)
        gathered = jax.lax.all_gather(taken, "x", tiled=True)
        return jnp.tanh(state @ gathered[:64]) + weight, None

    return jax.lax.scan(step, x, weights)[0]


old = tuple(map(int, jaxlib.__version__.split(".")[:3])) < (0, 11, 2)
options = ({"xla_gpu_enable_pipelined_all_gather": True} if old
           else {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON"})
arguments = (jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=NamedSharding(mesh, P())),
             jax.ShapeDtypeStruct((128, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("x"))))
for hold in (False, True):
    mapped = jax.shard_map(lambda w, x: program(w, x, hold), mesh=mesh, in_specs=(P(), P("x")),
                           out_specs=P("x"), check_vma=False)
    text = jax.jit(mapped).lower(*arguments).compile(compiler_options=options).as_text()
    for name in ("give", "take"):
        print(text.count(f'custom_call_target="{name}"'), end=" ")
PROGRAM

fail=0
for version in 0.11.2 0.12.0.1; do
  "$python" -m venv "$folder/$version"
  pip=("$folder/$version/bin/pip" install -q --disable-pip-version-check)
  "${pip[@]}" "jax==$version" "jaxlib==$version"
  "${pip[@]}" --no-deps "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"
  seen=$("$folder/$version/bin/python" "$folder/count.py" "$here/../tests/targets/h200.txtpb" \
    2>/dev/null)
  echo "jaxlib $version: give, take stand ${seen% } times (as written: first two; held: last two)"
  [[ $seen == "4 2 4 4 " ]] || { echo "changed: expected 4 2 4 4"; fail=1; }
done
exit $fail
