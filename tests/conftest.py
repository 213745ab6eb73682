"""Eight CPU devices for every test, set before JAX is imported.

JAX_PLATFORMS=cuda in the environment runs the same tests on GPUs instead.
"""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only: shows something of the CPU platform alone")


def pytest_collection_modifyitems(items):
    if os.environ["JAX_PLATFORMS"] == "cpu":
        return
    for item in items:
        if item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason="shows something of the CPU platform alone"))
