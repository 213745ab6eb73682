#!/usr/bin/env bash
# Prints the path of a Python of the given version (find_python.sh 3.12), from the PATH or from
# pyenv; fails without a word if there is none.
set -euo pipefail
version=$1

candidates=("python$version" python3)
pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
for dir in "$pyenv_root/versions/$version".*; do
  candidates+=("$dir/bin/python")
done

for candidate in "${candidates[@]}"; do
  # pyenv's shims exist for every version and fail for those that are not selected.
  path=$("$candidate" -c "
import sys
if sys.version_info[:2] == tuple(map(int, '$version'.split('.'))):
    print(sys.executable)" 2>/dev/null || true)
  if [[ -n $path ]]; then
    echo "$path"
    exit 0
  fi
done
exit 1
