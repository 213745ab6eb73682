#!/usr/bin/env bash
# XLA:GPU of jaxlib 0.11.2 runs a custom call with a side effect twice where a scan stacks its result.
#
# Guessed: a custom call with custom_call_has_side_effect=true runs once in each iteration, whatever
# XLA fuses; that is what the attribute is for.
# Seen: jaxlib 0.11.2, default flags: the dynamic-slice fusion (xla_gpu_enable_dynamic_slice_fusion,
# on by default) clones the call into a fusion with the update that stacks its result. It keeps the
# original call, since a call with a side effect is never dead. Both run. A call that reads a slice
# of a multiple of 256 bytes is cloned as well. jaxlib 0.12.0.1 does not do so, 0.10.2 neither.
# With the flag off, the call stands once.
#
# Not only custom calls of one's own: on an H200 with jax 0.11.2, a jax.experimental.io_callback in a
# scan of 4 iterations that stacks f32[64] results called its host function 8 times, twice with each
# argument, and 4 times with the flag off.
#
# This program compiles ahead of time for a described H200, so that it needs no GPU; it needs PyPI,
# Python 3.12 and a C++ compiler. It fails if what was seen has changed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/count.py" <<'PROGRAM'
import os, pathlib, re, subprocess, sys, ctypes, tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

STUB = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error Nothing(ffi::RemainingArgs, ffi::RemainingRets) { return ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(Stub, Nothing, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
"""
folder = pathlib.Path(tempfile.mkdtemp(dir=os.path.dirname(__file__)))
(folder / "stub.cc").write_text(STUB)
subprocess.check_call(["g++", "-std=c++17", "-shared", "-fPIC", "-I", jax.ffi.include_dir(),
                       "-o", folder / "stub.so", folder / "stub.cc"])
library = ctypes.CDLL(str(folder / "stub.so"))
jax.ffi.register_ffi_target("draw", jax.ffi.pycapsule(library.Stub), platform="CUDA")

NEW = ("mem_clock_ghz", "reserved_shared_memory_per_block", "max_blocks_per_multiprocessor",
       "collective_memory_granularity")
lines = pathlib.Path(sys.argv[1]).read_text().splitlines(True)
target = "".join(line for line in lines if not line.strip().startswith(NEW))
topology = topologies.get_topology_desc("", platform="cuda", target_config=target, topology="1x1x1")
sharding = NamedSharding(Mesh(topology.devices, ("x",)), P())

draw = jax.ffi.ffi_call("draw", jax.ShapeDtypeStruct((64,), jnp.float32), has_side_effect=True)


def step(count, _):
    return count + 1, draw(count)


def program(count):
    return jax.lax.scan(step, count, None, length=4)[1]


for options in ({}, {"xla_gpu_enable_dynamic_slice_fusion": False}):
    argument = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    text = jax.jit(program).lower(argument).compile(compiler_options=options).as_text()
    print(len(re.findall('custom_call_target="draw"', text)), end=" ")
PROGRAM

fail=0
expect() {  # VERSION COUNTS: with default flags, and with the fusion off
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q --disable-pip-version-check "jax==$1" "jaxlib==$1"
  "$folder/$1/bin/pip" install -q --disable-pip-version-check --no-deps \
    "jax-cuda13-plugin==$1" "jax-cuda13-pjrt==$1"
  seen=$("$folder/$1/bin/python" "$folder/count.py" "$here/../tests/targets/h200.txtpb" 2>/dev/null)
  echo "jaxlib $1: the call of the loop's body stands ${seen% } times (by default, without fusion)"
  [[ $seen == "$2" ]] || { echo "changed: expected $2"; fail=1; }
}
expect 0.11.2 "2 1 "
expect 0.12.0.1 "1 1 "
exit $fail
