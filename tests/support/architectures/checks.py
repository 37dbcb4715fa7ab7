"""What has to hold of each architecture, dense and with routers.

    files = prepare(folder)          # writes all files, and the stock library's logits of each
    results = run(files, "everything")  # name -> {check: "" or what is wrong}

A library runs in a process of its own, and each check in a child of that process: an architecture
that aborts costs the result of one check only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import gguf  # noqa: F401  each child would import it anew, which takes most of its time
import numpy as np

from mod_export.llamacpp import build as llama_build
from mod_export.runtime import bindings
from mod_export.units import ATTN, BLOCK, KV, UNIT_KINDS, Unit
from tests.support import c_api
from tests.support.architectures import models, routers
from tests.support.architectures.models import Model

TOKENS = np.random.default_rng(7).integers(0, 128, 76)
PROMPT = 60  # the other tokens come one by one
UBATCH = 32
SECONDS = 60  # that a file may take
# How much logits may differ where a prompt is cut differently, as a part of their standard
# deviation: this much, or this many times what the stock library's own of the dense file do.
NOISE, TIMES_STOCK = 2e-3, 4
MARGIN = 1e-4  # between a score and its threshold
# plain: K/V of f32; fast: flash attention on K/V of f16
ATTENTIONS: dict[str, dict] = {"plain": {}, "fast": {"fa": True, "kv": c_api.F16}}
REFUSED = "refused: "  # begins the result where the library refuses a file
# The stock library has no causal decode of them, and aborts.
NOT_CAUSAL = {"modern-bert", "neo-bert", "eurobert", "gemma-embedding", "t5", "t5encoder"}
NOT_CAUSAL |= {"dream", "llada", "llada-moe", "rnd1"}


WITHOUT = "without"  # folder of the files without their last layers
# architectures with a factor that depends on the number of layers
BY_LAYERS = {"minicpm3", "minimax-01"}
STANDARD = 1  # enum llama_swa_type


class RefusedError(Exception):
    """The library does not load a file, or makes no context of it; the text is its own."""


def prepare(folder: Path, names: list[str] | None = None) -> list[Model]:
    """Write the files, and beside each the logits that the stock library computes.

    The same with the files without the last layers, in the folder WITHOUT.
    """
    files = models.write(folder, names)
    shorter = _without(files, folder / WITHOUT)
    stock = llama_build.build(stock=True)
    run([model for model in files if model.architecture not in NOT_CAUSAL], "reference", stock)
    run(shorter, "short", stock)
    return files


def _without(files: list[Model], folder: Path) -> list[Model]:
    """Write the files without the layers that block units stand on; some have a fixed number."""
    folder.mkdir(exist_ok=True)
    wanted: dict[int, list[str]] = {}
    for model in files:
        layers = routers.trailing(model)
        if layers and model.architecture not in BY_LAYERS:
            n_layer = model.n_layer - len(layers)
            wanted.setdefault(n_layer, []).append(model.name)
    written = []
    attention = {model.name: (model.n_swa, model.alibi) for model in files}
    for n_layer, names in wanted.items():
        for model in models.write(folder, names, n_layer, exact=True):
            same = (model.n_swa, model.alibi) == attention[model.name]
            if model.n_layer == n_layer and same:
                written.append(model)
    return written


def run(files: list[Model], task: str, lib: Path | None = None) -> dict[str, dict]:
    """Run a task of TASKS on each file with a library, and return the results by the files' names.

    lib: a folder with libllama.so; None takes the installed one.
    """
    env = os.environ | {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("LLAMA_MOD_DECODE", None)
    if lib is not None:
        env |= {"LLAMA_CPP_LIB_PATH": str(lib), "LD_LIBRARY_PATH": str(lib)}
    jobs = [asdict(model) | {"path": str(model.path)} for model in files]
    command = [sys.executable, "-m", __name__, task]
    result = subprocess.run(
        command, input=json.dumps(jobs), env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(line) for line in result.stdout.splitlines())


def main() -> None:
    """Read files from stdin, and print a line of JSON for each: its name and its results."""
    task = TASKS[sys.argv[1]]
    for job in json.load(sys.stdin):
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in job.items()}
        model = Model(**fields | {"path": Path(job["path"])})
        results: dict[str, str] = {}
        for name, check in task(model, results):
            results[name] = _in_child(check)
        print(json.dumps([model.name, results]), flush=True)


def _in_child(check) -> str:
    """Run a check in a child: "" where all is well, else what it found or how it ended."""
    with tempfile.TemporaryFile("w+") as found, tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            signal.alarm(SECONDS)
            found.write(_finding(check))
            found.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        found.seek(0)
        if status == 0:
            return found.read()
        last = said.read().strip().splitlines()[-1:]
        return " ".join([f"the process ended with {os.waitstatus_to_exitcode(status)}:", *last])


def _finding(check) -> str:
    try:
        check()
    except RefusedError as exc:
        return f"{REFUSED}{exc}"
    except AssertionError as exc:
        return str(exc).strip() or "assertion failed"
    except Exception:
        return traceback.format_exc()[-600:]
    return ""


# Tasks: the names and checks of a file. They see the results of the checks before.


def reference(model: Model, _results):
    """Write the logits of the file itself with both kinds of attention, and their noise."""
    for label in ATTENTIONS:
        yield label, partial(_save, label, model)
    yield "noise", partial(_save_noise, model)


def short(model: Model, _results):
    """Write the logits of a file without its last layers, with plain attention."""
    yield "plain", partial(_save, "plain", model)


def everything(model: Model, results: dict[str, str]):
    """Check the dense file, which kinds of routers it can have, and all of those in one file."""
    yield "dense", partial(_same_as_reference, model.path, model)
    for kind in UNIT_KINDS:
        yield kind, partial(_open, model, (kind,))
    kinds = tuple(kind for kind in UNIT_KINDS if results[kind] == "")
    if kinds:
        yield "routers", partial(_check_routers, model, kinds, True)
    if KV in kinds:  # alone, one token is one graph
        yield "kv alone", partial(_check_routers, model, (KV,), False)
    if BLOCK in kinds:
        yield "without", partial(_check_inactive, model)


def _save(label: str, model: Model) -> None:
    np.save(model.path.with_suffix(f".{label}.npy"), _logits(model.path, **ATTENTIONS[label]))


def _save_noise(model: Model) -> None:
    with _Run(model.path, n_ubatch=512) as r:
        whole = r.raw.decode(TOKENS)
    with _Run(model.path) as r:
        single = np.concatenate([r.raw.decode(token) for token in np.split(TOKENS, len(TOKENS))])
    np.save(model.path.with_suffix(".noise.npy"), _noise(whole, single))


def _noise(logits: np.ndarray, other: np.ndarray) -> float:
    return np.abs(logits - other).max() / logits.std()


@contextmanager
def _routed(
    model: Model, kinds: tuple[str, ...], by_head: bool = False
) -> Iterator[tuple[Path, list[Unit]]]:
    """A file with routers of the kinds, and its units.

    by_head: kv units of each K/V head, where the model has several
    """
    units = routers.units_of(model, kinds)
    units = routers.by_head(model, units) if by_head else units
    path = routers.route(model, model.path.with_suffix(".mod.gguf"), units)
    try:
        yield path, units
    finally:
        path.unlink()


def _open(model: Model, kinds: tuple[str, ...]) -> None:
    with _routed(model, kinds) as (path, _), _Run(path):
        pass


def _check_routers(model: Model, kinds: tuple[str, ...], by_head: bool) -> None:
    with _routed(model, kinds, by_head) as (path, units):
        _check_active(path, model)
        _check_cuts(path, units, model)


def _check_active(path: Path, model: Model) -> None:
    try:
        _same_as_reference(path, model, force="active")
    except AssertionError as exc:
        raise AssertionError(f"all active: {exc}") from exc


def _check_inactive(model: Model) -> None:
    """Without the blocks, the file is the one without these layers, where that could be written."""
    file = model.path.parent / WITHOUT / f"{model.path.stem}.plain.npy"
    if file.is_file():
        with _routed(model, (BLOCK,)) as (path, _):
            _same(_logits(path, force="inactive"), np.load(file), "all inactive")


def _check_cuts(path: Path, units: list[Unit], model: Model) -> None:
    """Results do not depend on how the tokens are cut, or on which graph runs one token."""
    with _Run(path, n_ubatch=512) as r:
        thresholds = _place_thresholds(r, units)
        r.clear()
        logits, active, score = r.decode(TOKENS)
    inside = active[routers.SINKS :].mean(0)
    assert ((inside > 0) & (inside < 1)).all(), f"units decide alike everywhere: {inside}"
    margin = np.abs(score - thresholds).min()
    stock = model.path.with_suffix(".noise.npy")
    limit = max(NOISE, TIMES_STOCK * np.load(stock) if stock.is_file() else 0)
    cases = {
        "ubatches of 7": ([20, 20, 20, 16], {"n_ubatch": 7}, None),
        "token by token": ([1] * len(TOKENS), {}, None),
        "a device's graph": ([40] + [1] * 36, {}, "graph"),
    }
    for case, (sizes, params, mode) in cases.items():
        if mode:
            os.environ["LLAMA_MOD_DECODE"] = mode
        try:
            with _Run(path, **params) as r:
                r.set_thresholds(thresholds)
                r.raw.set(kv_rollback=0)
                other, other_active = r.decode_cut(sizes)
                used = [r.raw.kv(layer).n_used for layer in range(model.n_layer)]
        finally:
            os.environ.pop("LLAMA_MOD_DECODE", None)
        different = np.argwhere(active != other_active)
        assert not len(different), (
            f"{case}: {len(different)} other decisions, first (token, unit) {different[0]}, "
            f"margin {margin:.1e}"
        )
        noise = _noise(logits, other)
        assert noise < limit, f"{case}: logits differ by {noise:.1e} of their spread"
        _check_cells(used, active, units, model, case)


def _check_cells(used, active, units: list[Unit], model: Model, case: str) -> None:
    """Each layer holds the cells that decisions and windows ask for, where nothing rolls back."""
    n = len(TOKENS)
    recent = n - np.arange(n)
    decided = {unit: active[:, i].astype(bool) for i, unit in enumerate(units)}
    for layer in (*model.full, *model.sliding):
        keep = np.ones(n, bool)
        for kind in (BLOCK, ATTN):
            keep &= decided.get(Unit(layer, kind), True)
        kv = [decided[unit] for unit in units if unit[:2] == (layer, KV)]
        if kv:
            keep = np.stack([keep & (x | (recent < routers.WINDOW)) for x in kv])
        if layer in model.sliding and model.swa_type == STANDARD:
            keep &= recent < model.n_swa
        if layer not in model.without_kv:
            assert used[layer] == keep.sum(), (
                f"{case}: layer {layer} holds {used[layer]} cells, not {keep.sum()}"
            )


def _place_thresholds(r: _Run, units: list[Unit]) -> np.ndarray:
    """Thresholds (logits) in gaps between scores, so that about half of the tokens are active.

    A unit's scores depend on the decisions before it, so the units are placed one after another.
    """
    thresholds = np.zeros(len(units), np.float32)
    for i in range(len(units)):
        r.clear()
        r.set_thresholds(thresholds)
        _, _, score = r.decode(TOKENS)
        found = np.sort(score[routers.SINKS :, i])
        middle = slice(len(found) // 4, -len(found) // 4)
        gaps = np.diff(found)[middle]
        at = int(np.argmax(gaps)) + middle.start
        assert gaps.max() > MARGIN, f"unit {i}: no gap between scores"
        thresholds[i] = (found[at] + found[at + 1]) / 2
    r.set_thresholds(thresholds)
    return thresholds


class _Run:
    """A context that takes the whole model's file; RefusedError where the library makes none."""

    def __init__(self, path: Path, force: str | None = None, **params) -> None:
        said: list[str] = []

        @c_api.llama_cpp.llama_log_callback
        def log(level, text, _data):
            if level >= 3:
                said.append(text.decode(errors="replace"))

        self.log = c_api._silent = log
        options = {"n_ctx": 256, "n_batch": 512, "n_ubatch": UBATCH, "n_seq": 1} | params
        try:
            self.raw = c_api.Raw(path, **options)
        except AssertionError as exc:
            raise RefusedError(_message(said) or str(exc)) from exc
        if force:
            self.raw.set(force=force)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_) -> None:
        self.raw.close()

    def clear(self) -> None:
        self.raw.clear()

    def decode(self, tokens):
        logits = self.raw.decode(tokens)
        return logits, *self.raw.trace()

    def decode_cut(self, sizes: list[int]):
        parts = np.split(TOKENS, np.cumsum(sizes)[:-1])
        logits, active, _ = zip(*(self.decode(part) for part in parts), strict=True)
        return np.concatenate(logits), np.concatenate(active)

    def set_thresholds(self, thresholds: np.ndarray) -> None:
        """thresholds: in logit space, one per unit"""
        for i, value in enumerate(thresholds):
            p = 1 / (1 + np.exp(-np.float64(value)))
            assert bindings.llama_mod_set_threshold(self.raw.ctx, i, ctypes.c_float(p)) == 0


def _message(said: list[str]) -> str:
    """The line in which the library refuses the routers, else its first line."""
    lines = [line.strip() for line in "".join(said).splitlines()]
    return next((line for line in lines if "mod: " in line), lines[0] if lines else "")


def _logits(path: Path, force: str | None = None, **params) -> np.ndarray:
    """The logits of a prompt in one batch, of several ubatches, and of tokens one by one."""
    with _Run(path, force, **params) as r:
        parts = [TOKENS[:PROMPT], *(TOKENS[i : i + 1] for i in range(PROMPT, len(TOKENS)))]
        return np.concatenate([r.raw.decode(part) for part in parts])


def _same_as_reference(path: Path, model: Model, force: str | None = None) -> None:
    for label, params in ATTENTIONS.items():
        file = model.path.with_suffix(f".{label}.npy")
        if file.is_file():  # else the stock library does not run it either
            _same(_logits(path, force, **params), np.load(file), label)


def _same(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(found, expected, equal_nan=True):
        first = int(np.argwhere((found != expected).any(1))[0][0])
        most = np.abs(found - expected).max()
        raise AssertionError(f"{what}: first at token {first}, at most {most:.1e}")


TASKS = {"reference": reference, "short": short, "everything": everything}

if __name__ == "__main__":
    main()
