"""The CUDA toolkit behind the nvcc on the PATH, as the repository @cuda; empty if there is none."""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**"]),
    includes = ["include"],
)

# What NVSHMEM's headers include.
cc_library(
    name = "cccl",
    includes = ["include/cccl"],
    deps = [":headers"],
)

# Static, so that the extension needs nothing but the driver, and that only when it runs.
cc_library(
    name = "runtime",
    srcs = ["lib/libcudart_static.a"],
    linkopts = ["-ldl", "-lpthread", "-lrt"],
    deps = [":headers"],
)
"""

def _impl(ctx):
    nvcc = ctx.which("nvcc")
    if nvcc == None:
        ctx.file("BUILD.bazel", "")
        ctx.file("defs.bzl", "NVCC = \"nvcc\"\n")
        return

    # nvcc may be a wrapper script: the compiler itself says where its toolkit is.
    dry_run = ctx.execute([nvcc, "--dryrun", "-c", "none.cu"])
    top = [
        line.partition("TOP=")[2].strip()
        for line in (dry_run.stderr + dry_run.stdout).splitlines()
        if "TOP=" in line
    ]
    if not top:
        fail("expected `%s --dryrun` to name its toolkit (TOP=...), got: %s" % (nvcc, dry_run.stderr))
    root = ctx.path(top[0])
    ctx.symlink(root.get_child("include"), "include")
    for lib in ["lib64", "targets/x86_64-linux/lib", "lib"]:
        path = ctx.path("%s/%s/libcudart_static.a" % (root, lib))
        if path.exists:
            ctx.symlink(path, "lib/libcudart_static.a")
            break
    ctx.file("defs.bzl", "NVCC = \"%s\"\n" % nvcc)
    ctx.file("BUILD.bazel", _BUILD)

cuda_configure = repository_rule(
    implementation = _impl,
    environ = ["PATH"],
    local = True,
)
