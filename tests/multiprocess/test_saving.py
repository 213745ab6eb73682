"""Programs that several processes saved, run by other processes: each finds buffer and sends."""

from __future__ import annotations

import pathlib

import pytest
import saved_programs

from processes import launcher

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("how", ["executable", "export"])
def test_programs_run_in_other_processes(how: str, tmp_path: pathlib.Path) -> None:
    def run(what: str, buffers: str) -> list[str]:
        arguments = (what, how, str(tmp_path), buffers)
        return launcher.run(saved_programs.main, *arguments, num_processes=2, num_devices=2)

    saved = run("save", "xy")
    assert all(text.startswith("[[[") for text in saved), saved
    assert run("load", "yx") == saved
    assert all("made for to be open: axes x" in text for text in run("load", "y"))
