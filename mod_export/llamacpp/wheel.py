"""A wheel of llama_cpp: the source distribution's Python files, and libraries that are built.

The wheel is written by hand because the distribution's own build backend would compile llama.cpp
once more.
"""

import base64
import csv
import hashlib
import io
import re
import sysconfig
import zipfile
from pathlib import Path


def write_wheel(source: Path, lib: Path, version: str, folder: Path) -> Path:
    """Write llama_cpp_python-{version}-py3-none-{platform}.whl into `folder` and return its path.

    source: the unpacked source distribution
    lib: a directory whose files become llama_cpp/lib
    """
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    tag = f"py3-none-{platform}"
    info = f"llama_cpp_python-{version}.dist-info"
    files = _package(source, version)
    for path in lib.iterdir():
        files[f"llama_cpp/lib/{path.name}"] = path.read_bytes()
    files[f"{info}/METADATA"] = _metadata(source, version)
    files[f"{info}/licenses/LICENSE.md"] = (source / "LICENSE.md").read_bytes()
    files[f"{info}/licenses/llama.cpp.LICENSE"] = (source / "vendor/llama.cpp/LICENSE").read_bytes()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: mod-export\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    )
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    wheel = folder / f"llama_cpp_python-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def _package(source: Path, version: str) -> dict[str, bytes]:
    """Name -> content of the Python files, with the new version in __init__.py."""
    paths = sorted((source / "llama_cpp").rglob("*.py*"))
    files = {str(path.relative_to(source)): path.read_bytes() for path in paths}
    plain = version.partition("+")[0]
    init = files["llama_cpp/__init__.py"]
    files["llama_cpp/__init__.py"] = init.replace(f'"{plain}"'.encode(), f'"{version}"'.encode())
    return files


def _metadata(source: Path, version: str) -> bytes:
    """The distribution's own metadata without its long description."""
    head = (source / "PKG-INFO").read_text(encoding="utf-8").partition("\n\n")[0]
    replaced = ("Version:", "Description-Content-Type:")
    lines = [line for line in head.splitlines() if not line.startswith(replaced)]
    lines.insert(2, f"Version: {version}")
    return ("\n".join(lines) + "\n\nPatched for Mixture-of-Depths models by mod-export.\n").encode()


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    """The file RECORD: name, hash and size of each file but itself."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow([name, f"sha256={digest}", len(content)])
    writer.writerow([own_name, "", ""])
    return out.getvalue().encode()
