"""The repository @nvshmem: the headers of the pip package nvidia-nvshmem-cu13, for --config=cuda.

Nothing is linked: the library is loaded at run time. The package is looked for as those of
third_party/python/configure.bzl are; a build without CUDA does without it.
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**"]),
    includes = ["include"],
)
"""

_FIND = """
import importlib.util
try:
    print(importlib.util.find_spec("nvidia.nvshmem").submodule_search_locations[0])
except (AttributeError, ModuleNotFoundError):
    pass
"""

_MISSING = "#error no package nvidia-nvshmem-cu13; `make setup CUDA=1` installs what the build needs\n"

def _impl(ctx):
    name = ctx.os.environ.get("JAX_SM_FREE_PYTHON", "python3")
    python = ctx.path(name) if name.startswith("/") else ctx.which(name)
    if not python:
        fail("JAX_SM_FREE_PYTHON: no interpreter '%s' on the PATH" % name)
    result = ctx.execute(
        [python, "-c", _FIND],
        environment = {"PYTHONPATH": ctx.os.environ.get("JAX_SM_FREE_HEADERS", "")},
    )
    root = result.stdout.strip()
    if root:
        # Copied, because pip deletes the isolated environment it builds a wheel in.
        copied = ctx.execute(["cp", "-RL", root + "/include", "include"])
        if copied.return_code:
            fail(copied.stderr)
    else:
        ctx.file("include/nvshmem_host.h", _MISSING)
    ctx.file("BUILD.bazel", _BUILD)

nvshmem_configure = repository_rule(
    implementation = _impl,
    environ = [
        "JAX_SM_FREE_PYTHON",
        "JAX_SM_FREE_HEADERS",
        "PATH",
    ],
    local = True,
)
