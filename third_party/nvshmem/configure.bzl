"""The repository @nvshmem: the headers of the pip package nvidia-nvshmem-cu13.

Nothing is linked: the library is loaded at run time. The package is looked for as those of
third_party/python/configure.bzl are. Without --config=cuda, which sets JAX_SM_FREE_CUDA, it is not
looked for, and there are no headers.
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
import importlib.util, sys
try:
    print(importlib.util.find_spec("nvidia.nvshmem").submodule_search_locations[0])
except (AttributeError, ModuleNotFoundError):
    sys.exit("no package nvidia-nvshmem-cu13; `make setup CUDA=1` installs what the build needs")
"""

def _impl(ctx):
    ctx.file("BUILD.bazel", _BUILD)
    if ctx.os.environ.get("JAX_SM_FREE_CUDA", "0") == "0":
        return
    name = ctx.os.environ.get("JAX_SM_FREE_PYTHON", "python3")
    python = ctx.path(name) if name.startswith("/") else ctx.which(name)
    if not python:
        fail("JAX_SM_FREE_PYTHON: no interpreter '%s' on the PATH" % name)
    found = ctx.execute(
        [python, "-c", _FIND],
        environment = {"PYTHONPATH": ctx.os.environ.get("JAX_SM_FREE_HEADERS", "")},
    )
    if found.return_code:
        fail("%s: %s" % (python, found.stderr.strip()))

    # Copied, because pip deletes the isolated environment it builds a wheel in.
    copied = ctx.execute(["cp", "-RL", found.stdout.strip() + "/include", "include"])
    if copied.return_code:
        fail(copied.stderr)

nvshmem_configure = repository_rule(
    implementation = _impl,
    environ = [
        "JAX_SM_FREE_CUDA",
        "JAX_SM_FREE_PYTHON",
        "JAX_SM_FREE_HEADERS",
        "PATH",
    ],
    local = True,
)
