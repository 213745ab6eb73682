"""Copies the headers that extensions are built from into a directory; prints sys.executable.

Usage: collect.py DIRECTORY. Runs under the interpreter that the extensions are built for.
"""

import importlib.util
import pathlib
import shutil
import sys
import sysconfig


def package_dir(name: str) -> pathlib.Path:
    """Finds a package without importing it: jaxlib's headers may be another Python's."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"no package {name}; `make setup` installs what the build needs")
    return pathlib.Path(spec.origin).parent


def main(destination: pathlib.Path) -> None:
    python_include = pathlib.Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").exists():
        sys.exit(f"no Python.h in {python_include}; on Debian, install python3-dev")
    nanobind = package_dir("nanobind")
    sources = {
        "python": python_include,
        "jaxlib": package_dir("jaxlib") / "include",
        "nanobind/include": nanobind / "include",
        "nanobind/src": nanobind / "src",
        "nanobind/robin_map": nanobind / "ext" / "robin_map" / "include",
    }
    for name, source in sources.items():
        shutil.copytree(source, destination / name)
    print(sys.executable)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
