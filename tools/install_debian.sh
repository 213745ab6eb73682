#!/usr/bin/env bash
# Installs those of the given Debian packages that are missing; silent when there are none.
set -euo pipefail

give_up() {
  echo "jax_sm_free: $1; needed are the Debian packages: ${missing[*]}" >&2
  exit 1
}

missing=()
for package in "$@"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

command -v apt-get >/dev/null || give_up "there is no apt-get here"
as_root=()
if [[ $(id -u) != 0 ]]; then
  command -v sudo >/dev/null || give_up "installing needs root or sudo"
  as_root=(sudo)
fi

echo "Installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${as_root[@]}" apt-get update -qq &&
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  grep -E '^(E|W): ' "$log" >&2 || true
  give_up "apt-get failed"
fi
