#!/usr/bin/env bash
# clang-format and clang-tidy over our C++: lint_cc.sh PYTHON HEADERS.
set -euo pipefail
python=$1 headers=$2

find cc xla_ffi benchmarks -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' |
  xargs clang-format --dry-run -Werror

flags=(
  -std=c++20 -Wall -Wextra -I. '-DSMF_UCX_LIBRARY=""'
  -isystem "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  -isystem "$headers/jaxlib/include"
  -isystem "$headers/nanobind/include"
  -isystem "$headers/nanobind/ext/robin_map/include"
  -isystem "$headers/libucx/include"
)

# The emulation of CUDA's runtime has the names of CUDA, not ours.
sources=(find cc xla_ffi benchmarks -name '*.cc' -not -path 'cc/cuda/emulation/*')
if command -v nvcc >/dev/null; then
  toolkit=$(nvcc --dryrun -c none.cu 2>&1 | sed -n 's/.*TOP=//p')
  flags+=(
    -isystem "$toolkit/include"
    -isystem "$toolkit/include/cccl"
    -isystem "$headers/nvidia/nvshmem/include"
  )
else
  echo "$0: found no nvcc, so clang-tidy skips all sources for GPUs" >&2
  sources+=(-not -path '*cuda*' -not -path 'benchmarks/*')
fi

# Standard error is the count of warnings in headers of others, which are not shown either.
"${sources[@]}" -print0 | sort -z |
  xargs -0 -P "$(nproc)" -I '{}' clang-tidy --quiet '{}' -- "${flags[@]}" \
    2> >(grep -v '^[0-9]* warnings\? .*generated' >&2)
