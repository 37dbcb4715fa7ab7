"""The pinned source of llama.cpp: fetch, verify, unpack, patch. build.py compiles it.

patches/UPSTREAM names the source distribution. patches/overlay holds whole files that are copied
over vendor/llama.cpp in it. patches/series lists the hook patches that are applied after that.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from mod_export.common.files import atomic_dir, atomic_file
from mod_export.common.paths import SET_CACHE, cache_dir
from mod_export.errors import UserError

LLAMA_CPP = "vendor/llama.cpp"  # inside the source distribution
# Neither the build nor the converter reads these parts, which are most of the distribution.
UNUSED_PATHS = (
    ".git",
    "vendor/llama.cpp/.git",
    "vendor/llama.cpp/.github",
    "vendor/llama.cpp/models",
    "vendor/llama.cpp/docs",
    "vendor/llama.cpp/media",
    "vendor/llama.cpp/benches",
    "vendor/llama.cpp/tools/ui",
)
# But cmake reads these: they make an empty list of the files of a page.
USED_FILES = {
    f"vendor/llama.cpp/tools/ui/{name}" for name in ("CMakeLists.txt", "ui.cpp.in", "ui.h.in")
}


@dataclass(frozen=True)
class Pin:
    """What patches/UPSTREAM says. The build cache's key contains the text of this class.

    version: of llama-cpp-python
    commit: of llama.cpp
    sha256: of the source distribution
    """

    version: str
    commit: str
    sha256: str

    @property
    def filename(self) -> str:
        """Name of the source distribution."""
        return f"llama_cpp_python-{self.version}.tar.gz"


def patches_dir() -> Path:
    """The patches/ directory: the copy inside an installed package, or that of the checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "patches", package.parent / "patches"):
        if (path / "UPSTREAM").is_file():
            return path
    raise UserError("patches/UPSTREAM is missing", "install mod-export from a complete checkout")


def read_pin(patches: Path | None = None) -> Pin:
    """Read patches/UPSTREAM."""
    lines = ((patches or patches_dir()) / "UPSTREAM").read_text().splitlines()
    values = dict(line.split() for line in lines if line.strip() and not line.startswith("#"))
    return Pin(values["llama-cpp-python"], values["llama.cpp"], values["sha256"])


def read_series(patches: Path | None = None) -> list[Path]:
    """The hook patches in the order of patches/series."""
    patches = patches or patches_dir()
    names = [line.split("#")[0].strip() for line in (patches / "series").read_text().splitlines()]
    return [patches / name for name in names if name]


def overlay_files(patches: Path | None = None) -> list[Path]:
    """Paths of the overlay's files relative to it, sorted."""
    overlay = (patches or patches_dir()) / "overlay"
    return sorted(path.relative_to(overlay) for path in overlay.rglob("*") if path.is_file())


def patches_digest(tools: bool = False) -> str:
    """SHA-256 of what makes the patched source: the pin, the overlay, the patches in order.

    tools: with what changes the tools alone. The library is the same without it.
    """
    patches = patches_dir()
    digest = hashlib.sha256(repr(read_pin()).encode())
    overlay = [
        patches / "overlay" / name for name in overlay_files() if tools or name.parts[0] != "tools"
    ]
    series = [path for path in read_series() if tools or not _changes_tools_alone(path)]
    for path in [*overlay, *series]:
        digest.update(f"\n{path.relative_to(patches)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _changes_tools_alone(patch: Path) -> bool:
    changed = re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)
    return all(name.startswith(("tools/", "common/")) for name in changed)


def fetch_sdist(given: Path | None = None) -> Path:
    """Return the verified source distribution: `given`, the cached one, or one fetched with pip.

    Raises UserError where pip fails, with its last error, and where the SHA-256 is not the pinned
    one.
    """
    pin = read_pin()
    cached = cache_dir() / pin.filename
    if given is None and cached.is_file() and _sha256(cached) == pin.sha256:
        return cached
    source = given or _pip_download(pin)
    if not source.is_file():
        raise UserError(f"no such file: {source}", "check the path")
    if (found := _sha256(source)) != pin.sha256:
        raise UserError(
            f"{source.name} has SHA-256 {found}, expected {pin.sha256}", "fetch it again"
        )
    with atomic_file(cached, force=True, cure=SET_CACHE) as tmp:
        shutil.copyfile(source, tmp)
    if given is None:
        shutil.rmtree(source.parent)
    return cached


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(pin: Pin) -> Path:
    """Let pip fetch the source distribution from the user's index into a folder of the cache."""
    folder = cache_dir("download")
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # not as a wheel; but pip may take wheels of the tools with which it reads the metadata
    command += ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder)]
    command.append(f"llama-cpp-python=={pin.version}")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if "ERROR" in line or "No module" in line]
        last = (errors or lines or ["pip failed"])[-1]
        cure = "check the network, or fetch it elsewhere and give it as --sdist"
        if "No module named pip" in last:
            cure = "run `python -m ensurepip`"
        elif re.search("No space left|Errno 28|quota", last):
            cure = "make room on the disk, or set MOD_EXPORT_CACHE"
        raise UserError(f"pip could not fetch llama-cpp-python {pin.version}: {last}", cure)
    return folder / pin.filename


def source_dir(stock: bool = False, sdist: Path | None = None) -> Path:
    """The unpacked source in the cache, patched unless `stock`. It is made where it is missing."""
    path = _source_path(stock)
    if not path.is_dir():
        with atomic_dir(
            cache_dir("source") / path.name, force=True, markers=("PKG-INFO",), cure=SET_CACHE
        ) as tmp:
            unpack(fetch_sdist(sdist), tmp)
            if not stock:
                apply_patches(tmp / LLAMA_CPP)
    return path


def is_unpacked(stock: bool = False) -> bool:
    """Whether source_dir() has nothing to do."""
    return _source_path(stock).is_dir()


def _source_path(stock: bool) -> Path:
    """Where the source lies; another place where other parts of the distribution are unpacked."""
    source = read_pin().sha256 if stock else patches_digest(tools=True)
    parts = repr((source, UNUSED_PATHS, sorted(USED_FILES)))
    digest = hashlib.sha256(parts.encode()).hexdigest()
    return cache_dir() / "source" / f"{'stock' if stock else 'patched'}-{digest[:12]}"


def unpack(sdist: Path, target: Path, only: set[str] | None = None) -> None:
    """Extract the used parts of the source distribution, or the files `only`, into `target`.

    The paths begin with vendor/ and llama_cpp/.
    """
    members = []
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 (Debian 12 has 3.11.2) knows no filters. The archive is known by its
        # hash, so that it needs none.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        for member in archive:
            # The name loses the leading llama_cpp_python-x.y.z/.
            member.name = member.name.partition("/")[2]
            unused = any(f"{member.name}/".startswith(f"{path}/") for path in UNUSED_PATHS)
            used = member.name in USED_FILES or (member.name and not unused)
            if used and (only is None or member.name in only):
                members.append(member)
        archive.extractall(target, members)


def apply_patches(root: Path) -> None:
    """Copy the overlay over `root`, an unpacked vendor/llama.cpp, and apply the series."""
    copy_overlay(root)
    for patch in read_series():
        git_apply(root, patch)


def copy_overlay(root: Path, patches: Path | None = None) -> None:
    """Copy patches/overlay over `root`."""
    patches = patches or patches_dir()
    for name in overlay_files(patches):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(patches / "overlay" / name, root / name)


def git_apply(root: Path, patch: Path) -> None:
    """Apply one patch to `root`. Raises UserError with git's words where the patch does not fit."""
    # inside another checkout `git apply` without the ceiling exits 0 and changes nothing
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent)}
    command = ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
    result = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, errors="replace"
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["git apply failed"])[0]
        raise UserError(f"{patch.name} does not apply: {said}", "see patches/README.md")
