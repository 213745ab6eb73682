"""The repository @python: an interpreter, its headers, and the C++ parts of two pip packages.

Environment:
  JAX_SM_FREE_PYTHON   interpreter to build for and to run the Python tests with (default: python3)
  JAX_SM_FREE_HEADERS  directory that holds jaxlib and nanobind (default: that interpreter's own)

Files are copied, not linked, because pip deletes the isolated environment it builds a wheel in.
"""

def _python_configure_impl(ctx):
    name = ctx.os.environ.get("JAX_SM_FREE_PYTHON", "python3")
    python = ctx.path(name) if name.startswith("/") else ctx.which(name)
    if not python:
        fail("JAX_SM_FREE_PYTHON: no interpreter '%s' on the PATH" % name)

    result = ctx.execute(
        [python, ctx.path(Label("//third_party/python:collect.py")), "."],
        environment = {"PYTHONPATH": ctx.os.environ.get("JAX_SM_FREE_HEADERS", "")},
    )
    if result.return_code:
        fail("%s: %s" % (python, result.stderr.strip()))

    ctx.template(
        "BUILD.bazel",
        Label("//third_party/python:python.BUILD"),
        {"%{interpreter}": result.stdout.strip()},
    )

python_configure = repository_rule(
    implementation = _python_configure_impl,
    environ = [
        "JAX_SM_FREE_PYTHON",
        "JAX_SM_FREE_HEADERS",
        "PATH",
    ],
    local = True,
)
