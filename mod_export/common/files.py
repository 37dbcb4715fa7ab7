"""Outputs that appear whole or not at all.

Example:

    with atomic_file("model.gguf", force=False) as tmp:   # tmp lies beside model.gguf
        write(tmp)  # renamed at the end, removed on any exception
"""

import ctypes
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mod_export.common.text import size
from mod_export.errors import UserError

logger = logging.getLogger(__name__)

ANOTHER = "choose another output"
TOLD_BYTES = 100e6  # what outputs take from here on is told
KEEP_SIZE, PUNCH_HOLE = 1, 2  # flags of fallocate(2)
MARKERS = ("config.json", "mod.json")  # of directories that a command has written


@contextmanager
def atomic_file(
    path: str | os.PathLike, force: bool = False, cure: str = ANOTHER
) -> Iterator[Path]:
    """Yield an empty temporary file, which takes the place of `path` when the block ends well.

    The temporary file lies beside `path`. Raises UserError where `path` exists and `force` is not
    set, where `path` is no regular file, and, with `cure`, where it cannot be written.
    """
    target = check_file(path, force)
    tmp = _beside(target)
    try:
        tmp.touch(exist_ok=False)
        yield tmp
        os.replace(tmp, target)
    except OSError as exc:
        raise _unwritable(exc, tmp, path, cure) from exc
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def atomic_dir(
    path: str | os.PathLike,
    force: bool = False,
    markers: Sequence[str] = MARKERS,
    cure: str = ANOTHER,
) -> Iterator[Path]:
    """Yield an empty temporary directory, which takes the place of `path` when the block ends well.

    The temporary directory lies beside `path`. With `force` an existing directory is replaced
    whole, but only where it is empty or holds one of `markers`: a mistyped `-o ~ --force` must not
    cost a home directory. Raises UserError as atomic_file does, with `cure` where the disk is full.
    """
    target = check_dir(path, force, markers)
    tmp, old = _beside(target), _beside(target)
    try:
        tmp.mkdir()
        yield tmp
        _share(tmp)
        if target.exists():
            target.rename(old)
        tmp.rename(target)
    except OSError as exc:
        raise _unwritable(exc, tmp, path, cure) from exc
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def folder_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`, for what becomes the output there.

    Raises UserError where it cannot be written.
    """
    tmp = _beside(Path(os.path.realpath(path)))
    try:
        tmp.mkdir()
        yield tmp
    except OSError as exc:
        raise _unwritable(exc, tmp, path) from exc
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def locked(
    path: str | os.PathLike,
    busy: Callable[[], object],
    cure: str = "check its permissions and the disk's room",
) -> Iterator[None]:
    """Let one process at a time into the block: all that lock the same `path`.

    path: a directory, which holds the lock file `.lock` meanwhile, or a name, beside which
    `path.lock` lies. busy: this function is called where another process is inside. It may raise;
    else that process is waited for. Raises UserError, with this `cure`, where the lock file cannot
    be written.
    """
    from filelock import FileLock, Timeout

    file = Path(path, ".lock") if os.path.isdir(path) else Path(f"{path}.lock")
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()  # where that fails, FileLock would wait for ever
        try:
            lock.acquire(blocking=False)
        except Timeout:
            busy()
            lock.acquire()
    except OSError as exc:
        raise UserError(f"cannot write {file}: {exc.strerror}", cure) from exc
    try:
        yield
    finally:
        # whoever waits for the removed file sees that it is gone, and makes a new one
        file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def safetensors_errors() -> Iterator[None]:
    """Raise OSError for files that safetensors cannot write: its own error is none."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as exc:
        raise OSError(str(exc).rpartition("I/O error: ")[2]) from exc


def check_file(path: str | os.PathLike, force: bool = False) -> Path:
    """Return the path where atomic_file would write. Call this before hours of work.

    Raises UserError where atomic_file would refuse.
    """
    target = _check_target(path, force)
    if target.exists() and not target.is_file():
        # replacing a directory, or a device such as /dev/null, by a file is never what was meant
        raise UserError(f"{path} exists and is not a regular file", "choose another output name")
    return target


def check_dir(
    path: str | os.PathLike, force: bool = False, markers: Sequence[str] = MARKERS
) -> Path:
    """Return the path where atomic_dir would write. Call this before hours of work.

    Raises UserError where atomic_dir would refuse.
    """
    target = _check_target(path, force)
    if target.exists() and not target.is_dir():
        raise UserError(f"{path} exists and is not a directory", "choose another output name")
    known = any((target / name).is_file() for name in markers)
    if target.is_dir() and any(target.iterdir()) and not known:
        raise UserError(
            f"{path} holds no {' or '.join(markers)}, so it is not replaced",
            "choose another output directory",
        )
    return target


def _check_target(path: str | os.PathLike, force: bool) -> Path:
    target = Path(os.path.realpath(path))  # the file a link points to is the one to replace
    if not target.parent.is_dir():
        raise UserError(
            f"there is no directory {target.parent} to write {target.name} in", "create it first"
        )
    if target.exists() and not force:
        raise UserError(f"{path} exists already", "use --force to replace it")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write {path}: no permission in {target.parent}", "choose another output"
        )
    return target


def remove_left(path: str | os.PathLike, used: Path) -> None:
    """Remove what killed processes have left beside an output that no other process writes.

    used: a temporary directory of this process, or what lies in one.
    """
    target = Path(os.path.realpath(path))
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}.tmp"):
        if left not in (used, *used.parents):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def check_room(
    path: str | os.PathLike,
    n_bytes: float,
    what: str,
    cure: str = "free some, or write elsewhere",
) -> None:
    """Log how much of the disk a large output will take, and how much is free there.

    what: takes it, as the subject of a sentence. Raises UserError, with `cure`, where less is free.
    """
    parent = Path(os.path.realpath(path)).parent
    free = shutil.disk_usage(parent).free
    line = f"{what} takes up to {size(n_bytes)} of disk, of which {size(free)} are free"
    if n_bytes > free:
        raise UserError(line, cure)
    if n_bytes >= TOLD_BYTES:
        logger.info(line)


def give_back(file: BinaryIO, start: int, n_bytes: int) -> None:
    """Give the room of some bytes of a file back to the disk; they are zeros then.

    The file keeps its length. Nothing happens where the system or the file system cannot do it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "fallocate64"):
        offsets = ctypes.c_int64(start), ctypes.c_int64(n_bytes)
        libc.fallocate64(file.fileno(), KEEP_SIZE | PUNCH_HOLE, *offsets)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _unwritable(exc: OSError, tmp: Path, path: str | os.PathLike, cure: str = ANOTHER) -> Exception:
    """Return a UserError where the output is the trouble, as with a full disk, else `exc`."""
    concerns_output = exc.filename is None or str(exc.filename).startswith(str(tmp))
    return (
        UserError(f"cannot write {path}: {exc.strerror or exc}", cure) if concerns_output else exc
    )


def _share(directory: Path) -> None:
    """Let all who may read the directory read its files: safetensors lets the owner alone.

    Who may search the directory may run its programs.
    """
    shared = directory.stat().st_mode & 0o777
    for path in directory.rglob("*"):
        if path.is_file():
            program = path.stat().st_mode & 0o100
            path.chmod(shared if program else shared & 0o666)
