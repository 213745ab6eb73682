"""Runs pytest on the files given: the entry point of the py_test targets."""

import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No cache: under Bazel the working directory is the read-only tree of runfiles.
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
