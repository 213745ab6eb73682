#!/usr/bin/env bash
# clang-format and clang-tidy over our C++: lint_cc.sh PYTHON HEADERS.
set -euo pipefail
python=$1 headers=$2

find cc xla_ffi benchmarks -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' |
  xargs clang-format --dry-run -Werror

# Sources for GPUs need the headers of a CUDA toolkit, which a machine may lack.
mapfile -t sources < <(find cc xla_ffi -name '*.cc' -not -path '*cuda*' | sort)
sources+=(
  xla_ffi/cuda_stub.cc cc/cuda/host/crossbar_test.cc
  cc/cuda/host/status_fault{,_test}.cc cc/cuda/processes/{shared_memory,symmetric_heap}{,_test}.cc
)

flags=(
  -std=c++20 -Wall -Wextra -I. '-DSMF_UCX_LIBRARY=""'
  -isystem "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  -isystem "$headers/jaxlib/include"
  -isystem "$headers/nanobind/include"
  -isystem "$headers/nanobind/ext/robin_map/include"
  -isystem "$headers/libucx/include"
)
# Standard error is the count of warnings in headers of others, which are not shown either.
printf '%s\0' "${sources[@]}" |
  xargs -0 -P "$(nproc)" -I '{}' clang-tidy --quiet '{}' -- "${flags[@]}" \
    2> >(grep -v '^[0-9]* warnings\? .*generated' >&2)
