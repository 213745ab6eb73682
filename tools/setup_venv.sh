#!/usr/bin/env bash
# Makes a virtual environment that imports the checkout: setup_venv.sh PYTHON VENV HEADERS [JAX].
#
# JAX is a version of JAX, instead of the one that requirements/dev.txt has for this Python.
# HEADERS receives the packages whose C++ headers the build uses. They are kept apart, since
# the jaxlib to build against and the jaxlib to run with are different ones on newer Pythons.
set -euo pipefail
python=$1 venv=$2 headers=$3 jax=${4:-}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "jax_sm_free: needs Python 3.11 or newer, and $python is older; make PYTHON=... chooses one" >&2
  exit 1
}
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -qq --upgrade -r requirements/dev.txt -r requirements/lint.txt
[[ -z $jax ]] || pip install -qq "jax==$jax" "jaxlib==$jax"

# XLA's GPU compiler, to read the schedule it makes for a GPU on a machine without one. The
# libraries that running would need are left out.
jaxlib=$("$venv/bin/python" -c 'import jaxlib; print(jaxlib.__version__)')
pip install -qq --no-deps "jax-cuda13-plugin==$jaxlib" "jax-cuda13-pjrt==$jaxlib"

# The checkout itself, without a copy.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
pwd >"$site/jax_sm_free.pth"

mapfile -t requires < <("$venv/bin/python" - <<'EOF'
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
EOF
)
pip install -qq --no-deps --upgrade --target "$headers" "${requires[@]}"
