"""Devices for the tests, chosen before JAX is imported: eight on the CPU, unless told otherwise.

JAX_PLATFORMS=cuda in the environment runs the same tests on the GPUs that there are; groups of
ranks shrink to them. XLA_FLAGS=--xla_force_host_platform_device_count=2 does so on the CPU.
"""

import faulthandler
import gc
import importlib.metadata
import os
import sys

import pytest

HANG_SECONDS = 150


def add_flag(name, value):
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


os.environ.setdefault("JAX_PLATFORMS", "cpu")
ON_GPUS = "cuda" in os.environ["JAX_PLATFORMS"]
add_flag("xla_force_host_platform_device_count", 8)
if ON_GPUS:
    # Callbacks run on a CPU device, and some tests need one beside the GPUs.
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    # Several workers share the GPUs, and buffers take memory that is not XLA's.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Tests compare sums of products: no TF32. Choosing among kernels would take time.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    add_flag("xla_gpu_autotune_level", 0)
elif importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")):
    # XLA's compiler takes most of the time of these tests, and these flags halve it. The tests look
    # at which ops run, in which order and on what. XLA decides that before it generates code. With
    # newer versions of JAX the same tests run at XLA's default optimization level.
    add_flag("xla_cpu_parallel_codegen_split_count", 1)
    add_flag("xla_backend_optimization_level", 0)
    add_flag("xla_cpu_use_fusion_emitters", "false")

MARKERS = {
    "cpu_only": "shows something of the CPU platform alone",
    "gpu_only": "needs GPUs (JAX_PLATFORMS=cuda)",
    "alone": "reads times or memory off the GPUs, which no other process may use meanwhile",
    "one_process": "is about what a rank computes by itself, whoever carries its rows",
    "long": "takes a while, and little of it depends on JAX's version",
}


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds of a test, where pytest-timeout is not installed")


def pytest_configure(config):
    for name, reason in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {reason}")


def pytest_collection_modifyitems(items):
    skipped = "cpu_only" if ON_GPUS else "gpu_only"
    for item in items:
        if item.get_closest_marker(skipped):
            item.add_marker(pytest.mark.skip(reason=MARKERS[skipped]))


@pytest.fixture(autouse=True)
def end_of_hangs(request):
    """Ends the process of a test that hangs, stacks first, where pytest-timeout does not."""
    if request.config.pluginmanager.hasplugin("timeout"):
        yield
        return
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True, scope="module")
def close_buffers_of_module():
    """Buffers that tests share take device memory and a thread for each GPU."""
    yield
    if ON_GPUS:
        import support

        support.runners.cache_clear()
        support.apis.cache_clear()
        gc.collect()
