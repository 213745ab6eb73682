"""Checks the links of the Markdown files, runs their Python blocks, and writes the API reference.

Usage: make_docs.py OUT, in the root of the checkout. The reference goes to OUT as HTML.

The ```python blocks of a file run as one script, from the first to the last, on eight CPU devices.
A block that starts with ```python raises=SomeError must raise that error.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap

import pdoc

PAGES = sorted(pathlib.Path().glob("*.md")) + sorted(pathlib.Path("docs").glob("*.md"))
FILES = [str(page) for page in PAGES if page.name not in ("CHANGELOG.md", "CONTRIBUTING.md")]
_BLOCK = re.compile(r"^```python(?: raises=(\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
_RAISING = """\
try:
{block}
except {error} as error:
    print("    as it should:", str(error)[:200])
else:
    raise SystemExit("expected {error} from:\\n" + {block!r})
"""


def broken_links() -> list[str]:
    """Links between files of the checkout that lead nowhere, each with its page."""
    return [
        f"{page}: {target}"
        for page in PAGES
        for target in _LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]


def script(text: str) -> str:
    """The Python blocks of a Markdown text, each on the lines where it stands there."""
    program, line = "", 1
    for block in _BLOCK.finditer(text):
        error, code = block.groups()
        if error:
            code = _RAISING.format(error=error, block=textwrap.indent(code.rstrip(), "    "))
        start = text.count("\n", 0, block.start(2)) + 1
        program += "\n" * max(0, start - line) + code
        line = program.count("\n") + 1
    return program


def run_blocks(path: str) -> bool:
    """Whether the blocks of a file run; prints what they have printed."""
    program = script(pathlib.Path(path).read_text())
    if not program:
        return True
    env = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        PYTHONWARNINGS="error:jax_sm_free",  # what users copy does not warn
    )
    with tempfile.TemporaryDirectory() as folder:
        # Tracebacks name the Markdown file and its lines.
        source = pathlib.Path(folder, pathlib.Path(path).name)
        source.write_text(program)
        run = subprocess.run(
            [sys.executable, str(source)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    print(f"the blocks of {path}:\n{run.stdout}", end="", flush=True)
    return run.returncode == 0


def main(out: str) -> int:
    if broken := broken_links():
        print(
            "expected files behind all links, got none behind", *broken, file=sys.stderr, sep="\n"
        )
        return 1
    # Files are independent of each other, so they run side by side.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [
            path for path, ran in zip(FILES, pool.map(run_blocks, FILES), strict=True) if not ran
        ]
    if failed:
        print(f"blocks failed in {', '.join(failed)}", file=sys.stderr)
        return 1
    templates = pathlib.Path(__file__).with_name("pdoc")
    pdoc.render.configure(docformat="google", show_source=False, template_directory=templates)
    pdoc.pdoc("jax_sm_free", output_directory=pathlib.Path(out))
    print(pathlib.Path(out, "jax_sm_free.html"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
