"""Copies built extensions beside the Python sources, under this interpreter's own suffix.

Usage: place_extension.py BAZEL_BIN MODULE..., in the root of the checkout.
"""

import filecmp
import os
import pathlib
import shutil
import sys
import sysconfig


def place(bazel_bin: pathlib.Path, module: str) -> None:
    source = bazel_bin / "jax_sm_free" / f"{module}.so"
    target = pathlib.Path("jax_sm_free", module + sysconfig.get_config_var("EXT_SUFFIX"))
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    # Renamed into place: a process that has the old file mapped keeps it.
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


if __name__ == "__main__":
    for module in sys.argv[2:]:
        place(pathlib.Path(sys.argv[1]), module)
