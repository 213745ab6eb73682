"""Builds the extensions with Bazel; all else is in pyproject.toml.

JAX_SM_FREE_CUDA=1 in the environment builds the module for GPUs too.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
CUDA = os.environ.get("JAX_SM_FREE_CUDA", "0") != "0"
MODULES = ["_cpu", "_cuda"] if CUDA else ["_cpu"]
REQUIREMENTS = ROOT / "requirements" / "cuda.txt"


class BazelBuildExt(build_ext):
    """Asks Bazel for //<package>:<module>.so and puts it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        if shutil.which("bazel") is None:
            sys.exit("jax_sm_free: no `bazel` found; `make debian` installs it")
        package, module = ext.name.split(".")
        flags = [
            f"--repo_env=JAX_SM_FREE_PYTHON={sys.executable}",
            # In an isolated build, these lie apart from the interpreter's own packages.
            f"--repo_env=JAX_SM_FREE_HEADERS={pathlib.Path(nanobind.__file__).parents[1]}",
        ]
        if CUDA:
            flags.append("--config=cuda")
        build = subprocess.run(["bazel", "build", *flags, f"//{package}:{module}.so"], cwd=ROOT)
        if build.returncode:
            sys.exit("jax_sm_free: Bazel could not build the extension; its messages are above")
        info = subprocess.check_output(["bazel", "info", *flags, "bazel-bin"], cwd=ROOT, text=True)
        source = pathlib.Path(info.strip(), package, f"{module}.so")
        destination = pathlib.Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)


setup(
    # Beside those of pyproject.toml, which a build for the CPU does without.
    setup_requires=[
        line for line in REQUIREMENTS.read_text().splitlines() if CUDA and not line.startswith("#")
    ],
    ext_modules=[Extension(f"jax_sm_free.{module}", sources=[]) for module in MODULES],
    cmdclass={"build_ext": BazelBuildExt},
)
