"""Copies the built extension beside the Python sources, under this interpreter's own suffix.

Usage: place_extension.py BAZEL_BIN, in the root of the checkout.
"""

import filecmp
import os
import pathlib
import shutil
import sys
import sysconfig


def main(bazel_bin: pathlib.Path) -> None:
    source = bazel_bin / "jax_sm_free" / "_cpu.so"
    target = pathlib.Path("jax_sm_free", "_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    # Renamed into place: a process that has the old file mapped keeps it.
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
