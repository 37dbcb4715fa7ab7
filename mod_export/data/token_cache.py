"""Keep the token ids of training text in memory-mapped files.

The same text, tokenizer and options are tokenised once. An entry of the cache is a directory, which
appears whole or not at all. The directory holds meta.json, ids.bin (uint32), repeats.bin (a byte
for each token) and, where answers are marked, answers.bin (the same). The cache deletes no entry:
any of them can be deleted at will.

    tokens = tokens_of(tokenizer, ["books/", "chat.jsonl.gz"], answers=True)
    ids, answers, repeats = tokens.read(0, 1024)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mod_export.common.files import atomic_dir, locked
from mod_export.common.paths import SET_CACHE, cache_dir
from mod_export.common.progress import Progress, stage
from mod_export.data import conversations, sources
from mod_export.data.repeats import Repeats
from mod_export.data.text import bos
from mod_export.errors import UserError

logger = logging.getLogger(__name__)

# Version of the entries, which goes up with every change of their content.
VERSION = 3
TOKENS = "tokens"  # this part of the cache directory
# Bytes of text that are tokenised in one call.
BATCH = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """A long row of `count` tokens on disk.

    answers: the number of tokens that belong to answers; None where answers are not marked. begin:
    the tokens that begin a sequence (bos or nothing), which are not part of the row. fingerprint:
    identifies texts, tokenizer and options.
    """

    folder: Path
    count: int
    answers: int | None
    begin: tuple[int, ...]
    fingerprint: str

    def read(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the ids, answers and repeats of the tokens start to start + n.

        ids: int64 [n]. answers: bool [n], tokens of answers; all where answers are not marked.
        repeats: bool [n], tokens that repeat what was before (repeats.py).
        """
        # Each call maps the files anew and keeps none open, so the object can go to worker
        # processes.
        ids = np.memmap(self.folder / "ids.bin", "<u4", "r", 4 * start, n).astype(np.int64)
        answers = np.ones(n, bool) if self.answers is None else self._marks("answers", start, n)
        return ids, answers, self._marks("repeats", start, n)

    def _marks(self, name: str, start: int, n: int) -> np.ndarray:
        return np.memmap(self.folder / f"{name}.bin", np.uint8, "r", start, n).astype(bool)


def tokens_of(
    tokenizer,
    paths: Sequence[str | Path],
    answers: bool = False,
    limit: int | None = None,
    cache: str | Path | None = None,
) -> Tokens:
    """Return the mixed tokens of files and directories (sources.py), from the cache if possible.

    Tokens that the cache lacks are made and kept there.

    answers: mark the tokens of answers. limit: the largest number of tokens, of all files in
    proportion. cache: a directory, by default `tokens` in the cache directory of mod-export. Raises
    UserError for faults of the files, for a cache that cannot be written, and where answers are to
    be marked and the data have none.
    """
    files = sources.find(paths)
    with stage("reading the texts"):
        digest = sources.digest(files)
    options = {
        "version": VERSION,
        "files": digest,
        "tokenizer": _tokenizer_digest(tokenizer),
        "piece": sources.PIECE,
        "answers": answers,
        "limit": limit,
    }
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    # Without writing, so that a cache that may only be read serves too.
    folder = Path(cache) if cache is not None else cache_dir() / TOKENS
    if (found := _open(folder / key)) is None:
        _make_folder(folder, cache is None)
        with locked(folder, _tell_busy, SET_CACHE):  # The other process may tokenise the same text.
            if (found := _open(folder / key)) is None:
                pieces = _mixed(files, folder)
                with atomic_dir(folder / key, True, ("meta.json",), SET_CACHE) as tmp:
                    meta = _write(tokenizer, pieces, answers, limit, tmp)
                    (tmp / "meta.json").write_text(
                        json.dumps(meta | {"options": options}, indent=1)
                    )
                found = _open(folder / key)
    marked = f", {found.answers} of them in answers" if answers else ""
    logger.info(f"{found.count} tokens from {len(files)} file{'s' * (len(files) > 1)}{marked}")
    return found


def _tokenizer_digest(tokenizer) -> str:
    if tokenizer.is_fast:
        made = json.loads(tokenizer.backend_tokenizer.to_str())
        made["truncation"] = made["padding"] = None  # These are settings of the last call.
    else:
        made = [type(tokenizer).__name__, tokenizer.get_vocab()]
    text = json.dumps([made, tokenizer.chat_template, tokenizer.bos_token], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tell_busy() -> None:
    logger.info("another process tokenises; waiting for it")


def _make_folder(folder: Path, is_default: bool) -> None:
    if is_default:
        cache_dir(TOKENS)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(
            f"cannot create the cache directory {folder}: {exc.strerror}", "choose another"
        ) from exc


def _mixed(files: Sequence[Path], folder: Path) -> sources.Mixed:
    try:
        with stage("reading the texts"):
            return sources.Mixed(files, folder)
    except OSError as exc:  # Trouble with a file of text is a UserError already.
        raise UserError(
            f"cannot write to the cache directory {folder}: {exc.strerror}", SET_CACHE
        ) from exc


def _open(folder: Path) -> Tokens | None:
    """Return the entry, or None where the entry is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = Tokens(folder, meta["count"], meta["answers"], tuple(meta["begin"]), folder.name)
        sizes = {"ids.bin": 4 * tokens.count, "repeats.bin": tokens.count}
        sizes |= {} if tokens.answers is None else {"answers.bin": tokens.count}
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tokens if whole else None


def _write(
    tokenizer, pieces: sources.Mixed, answers: bool, limit: int | None, folder: Path
) -> dict:
    """Tokenise the pieces in their order until `limit`, and return the figures of the entry."""
    count = marked = 0
    progress = Progress()
    total = int(pieces.sizes.sum())
    repeats = Repeats()
    with contextlib.ExitStack() as stack:
        names = ("ids", "repeats", "answers")
        ids_file, repeats_file, answers_file = (
            stack.enter_context(open(folder / f"{n}.bin", "wb")) for n in names
        )
        for batch, done in _batches(pieces):
            ids, marks = conversations.encode(tokenizer, batch, answers)
            ids = np.concatenate(ids)[: None if limit is None else limit - count]
            ids.astype("<u4").tofile(ids_file)
            repeats.mark(ids).astype(np.uint8).tofile(repeats_file)
            count += len(ids)
            if answers:
                marks = np.concatenate(marks)[: len(ids)]
                marks.astype(np.uint8).tofile(answers_file)
                marked += int(marks.sum())
            if limit is not None and count >= limit:
                break
            share = max(done / total, count / limit if limit else 0)
            progress.tell("tokenising", share, 1, f"{count / 1e6:.1f} M tokens")
    progress.clear()
    if not answers:
        (folder / "answers.bin").unlink()
    elif not marked:
        raise UserError(
            "the data have no answers of an assistant",
            "use the loss on all tokens, or give conversations",
        )
    return {"count": count, "answers": marked if answers else None, "begin": bos(tokenizer)}


def _batches(pieces: sources.Mixed):
    """Yield some pieces at a time, each with the bytes that have been given out so far."""
    batch, size, done = [], 0, 0
    for piece, n in zip(pieces, pieces.sizes.tolist(), strict=True):
        batch.append(piece)
        size, done = size + n, done + n
        if size >= BATCH:
            yield batch, done
            batch, size = [], 0
    if batch:
        yield batch, done
