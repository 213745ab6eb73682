"""Rules for CUDA sources. They build with --config=cuda and are skipped without it."""

load("@cuda//:defs.bzl", "NVCC")
load("//tools:build_defs.bzl", "smf_cc_library")

CUDA_ONLY = select({
    "//tools:cuda": [],
    "//conditions:default": ["@platforms//:incompatible"],
})

# Code for Ampere and Hopper, and PTX that newer GPUs' drivers compile.
_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]

def smf_cuda_kernels(name, srcs, hdrs, deps = []):
    """Objects of .cu files. hdrs are all headers that they include, directly or not."""
    objects = []
    for src in srcs:
        out = src[:-len(".cu")] + ".pic.o"
        objects.append(out)
        native.genrule(
            name = src[:-len(".cu")] + "_object",
            srcs = [src] + hdrs,
            outs = [out],
            cmd = " ".join([
                NVCC,
                "-std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -fmad=false",
                "-Werror=all-warnings",
                "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
                "-I.",
            ] + _ARCHITECTURES + ["-c $(location %s) -o $@" % src]),
            message = "Compiling",
            target_compatible_with = CUDA_ONLY,
        )
    native.cc_library(
        name = name,
        srcs = objects,
        linkstatic = True,
        target_compatible_with = CUDA_ONLY,
        deps = deps + ["@cuda//:runtime"],
        alwayslink = True,
    )

def smf_cuda_library(name, deps = [], **kwargs):
    """A smf_cc_library of host code that calls CUDA's runtime."""
    smf_cc_library(
        name = name,
        target_compatible_with = CUDA_ONLY,
        deps = deps + ["@cuda//:runtime"],
        **kwargs
    )

def smf_kernels_on_host(name, kernels, sources, deps):
    """.cu files of cc/cuda/kernels compiled for the host, by the headers of cc/cuda/emulation."""
    wrappers = []
    for kernel in kernels:
        wrapper = kernel[:-len(".cu")] + "_on_host.cc"
        wrappers.append(wrapper)
        native.genrule(
            name = wrapper[:-len(".cc")],
            outs = [wrapper],
            cmd = "echo '#include \"cc/cuda/kernels/%s\"' > $@" % kernel,
        )
    native.cc_library(
        name = name,
        srcs = wrappers,
        textual_hdrs = sources,
        copts = [
            "-Icc/cuda/emulation",
            "-fno-strict-aliasing",  # Kernels move memory in words.
            "-w",  # nvcc looks for what is worth a warning.
        ],
        linkstatic = True,
        target_compatible_with = CUDA_ONLY,
        deps = deps,
    )
