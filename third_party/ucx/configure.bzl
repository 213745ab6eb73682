"""The repository @ucx: headers of the pip package libucx-cu13, and where its library is for tests.

Nothing is linked: the library is loaded at run time. The package is looked for as the others are,
see third_party/python/configure.bzl.
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    # Not ours to mend: no warnings from them.
    includes = ["include"],
)
"""

_FIND = """
import importlib.util, sys
spec = importlib.util.find_spec("libucx")
if spec is None: sys.exit("no package libucx (libucx-cu13); `make setup` installs what the build needs")
print(spec.submodule_search_locations[0])
"""

def _impl(ctx):
    name = ctx.os.environ.get("JAX_SM_FREE_PYTHON", "python3")
    python = ctx.path(name) if name.startswith("/") else ctx.which(name)
    if not python:
        fail("JAX_SM_FREE_PYTHON: no interpreter '%s' on the PATH" % name)
    result = ctx.execute(
        [python, "-c", _FIND],
        environment = {"PYTHONPATH": ctx.os.environ.get("JAX_SM_FREE_HEADERS", "")},
    )
    if result.return_code:
        fail("%s: %s" % (python, result.stderr.strip()))
    root = result.stdout.strip()

    # Copied, because pip deletes the isolated environment it builds a wheel in.
    copied = ctx.execute(["cp", "-RL", root + "/include", "include"])
    if copied.return_code:
        fail(copied.stderr)
    ctx.file("defs.bzl", "UCX_LIBRARY = \"%s/lib/libucp.so.0\"\n" % root)
    ctx.file("BUILD.bazel", _BUILD)

ucx_configure = repository_rule(
    implementation = _impl,
    environ = [
        "JAX_SM_FREE_PYTHON",
        "JAX_SM_FREE_HEADERS",
        "PATH",
    ],
    local = True,
)
