"""The types that mypy infers in a user's program."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import jax_sm_free

pytest.importorskip("mypy", reason="needs mypy (requirements/lint.txt)")

pytestmark = [pytest.mark.cpu_only, pytest.mark.long]

ROOT = pathlib.Path(jax_sm_free.__file__).parents[1]
PROGRAM = pathlib.Path(__file__).with_name("typed_program.py")


def check(path: pathlib.Path, cache: pathlib.Path) -> str:
    """What mypy --strict prints of a program, without the settings of this repository."""
    flags = ["--strict", "--config-file=", "--no-error-summary", f"--cache-dir={cache}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, str(path)],
        capture_output=True,
        text=True,
        cwd=path.parent,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert not done.stderr, done.stderr
    # What JAX itself, or another package, may do wrong is not asked here.
    return "\n".join(line for line in done.stdout.splitlines() if path.name in line)


def test_a_users_program_gets_the_types_of_all_results(tmp_path: pathlib.Path) -> None:
    assert check(PROGRAM, tmp_path / "cache") == ""
    # And mypy does look: another type than the one inferred is an error.
    wrong = tmp_path / "wrong_program.py"
    wrong.write_text(re.sub(r"smf\.Received\b(?!T)", "smf.ReceivedTokens", PROGRAM.read_text()))
    found = check(wrong, tmp_path / "cache")
    assert 'Expression is of type "Received", not "ReceivedTokens"' in found
    assert 'Expression is of type "Hook[Received]", not "Hook[ReceivedTokens]"' in found
