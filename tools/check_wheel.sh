#!/usr/bin/env bash
# Builds a wheel for GPUs and CPUs, and runs it where there is neither GPU nor CUDA:
# check_wheel.sh VENV HEADERS, both as made by setup_venv.sh.
set -euo pipefail
venv=$(realpath "$1") headers=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without isolation: with the build tools that are there, and with what Bazel has built of it.
JAX_SM_FREE_CUDA=1 PYTHONPATH=$headers "$venv/bin/python" -m pip --disable-pip-version-check \
  wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .

# JAX without any plugin for GPUs, and none of CUDA's libraries on the path.
jax=$("$venv/bin/python" -c 'import jax; print(jax.__version__)')
"$venv/bin/python" -m venv "$work/venv"
"$work/venv/bin/pip" --disable-pip-version-check install --quiet "jax==$jax" "$work"/*.whl
cp tools/try_wheel.py "$work"
cd "$work"
env -i PATH=/usr/bin:/bin HOME="$work" "$work/venv/bin/python" try_wheel.py
