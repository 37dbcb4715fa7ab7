"""MODEL -> MoD directory: load, calibrate or apply an adapter, save.

    convert("smollm2", "mod", units="kv", target=0.5)
    convert_adapter("smollm2", "mod", "adapter")         # trained routers and LoRA instead of calibration

Knows nothing of GGUF outputs; export.py turns the directory into one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mod_export.common.files import atomic_dir
from mod_export.config import KINDS, of_kinds
from mod_export.data.text import read_texts
from mod_export.errors import UserError
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile

logger = logging.getLogger(__name__)

WINDOW = 256  # docs/log.md: far better than 64 at equal K/V, and 3 % of a context of 8192 tokens
# By default the first layers stay whole: they decide with too little context. One must have
# complete K/V.
FIRST_ROUTED = {"kv": 1, "attn": 2, "ffn": 2, "block": 2}


def convert(
    model: str,
    out: str | Path,
    units: str = "kv",
    target: float | dict[str, float] = 0.5,
    kv_window: int | None = None,
    layers: str = "auto",
    calibration_text: Sequence[str | Path] = (),
    sink_tokens: int = 4,
    force: bool = False,
) -> None:
    """Write a calibrated MoD model to the directory `out`, whole or not at all.

    target: activation, one number or {kind: number}; kv_window: None is WINDOW, or an eighth of the
    model's context where that is less. Raises UserError for anything in the arguments, the model or
    the text that does not fit.
    """
    kinds = parse_units(units)
    chosen = parse_layers(layers)
    for share in of_kinds(target, kinds).values():
        if not 0 < share < 1:  # written so that NaN fails too
            raise UserError(
                f"--target-activation {share} is not between 0 and 1", "0.5 runs half of all units"
            )
    text = read_texts(calibration_text) if calibration_text else None
    with atomic_dir(out, force) as tmp:  # before the minutes of work: the output may be in the way
        from mod_export.calibration.calibrate import CalibrationPlan, calibrate
        from mod_export.model import architectures, loading
        from mod_export.model.mod_model import MoDModel

        refuse_mod(model)
        logger.info(f"loading {model}")
        base, tokenizer = loading.load(model)
        n_layer = len(architectures.decoder_layers(base))
        kv_window = kv_window or min(
            WINDOW, max(1, (architectures.context_length(base) or 8 * WINDOW) // 8)
        )
        plan = CalibrationPlan(
            {kind: layers_of(chosen, n_layer, kind) for kind in kinds},
            target,
            kv_window,
            sink_tokens,
            text,
        )
        config, routers = calibrate(base, tokenizer, plan)
        config = replace(
            config, calibration={"model": loading.name_of(model), **config.calibration}
        )
        logger.info(f"writing {out}")
        MoDModel.from_base(base, tokenizer, config, routers).save(
            tmp, force=True
        )  # over the empty tmp
    logger.info(summary(config, n_layer))


def convert_adapter(
    model: str,
    out: str | Path,
    adapter: str | Path,
    force: bool = False,
) -> None:
    """Write `model` with an adapter, LoRA merged, to the directory `out`, whole or not at all.

    adapter: a directory, or the name of a packaged one. Raises UserError where it is damaged or for
    another model.
    """
    from mod_export.formats import adapter_files

    path = adapter_files.resolve(adapter)
    adapter_files.read(path)  # before torch is imported and the model loaded
    with atomic_dir(out, force) as tmp:
        from mod_export.adapter import apply, load
        from mod_export.model import loading

        found = load(path)
        logger.info(f"loading {model}")
        mod = apply(found, *loading.load(model))
        logger.info(f"writing {out}")
        mod.save(tmp, force=True)  # over the empty tmp


def refuse_mod(model: str) -> None:
    """Raises UserError for a MoD directory or file, whose routers would be lost, and whose weights
    may be trained.
    """
    found, path = hf_directory.is_mod(model), Path(model)
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile.open(path)
        found = f"{file.architecture}.mod.version" in file.keys
    if found:
        raise UserError(
            f"{model} is a MoD model already", "convert the original, or train this one"
        )


def parse_units(units: str) -> list[str]:
    """`kv+ffn` -> ["kv", "ffn"]. Raises UserError for an unknown or repeated kind, and for block
    beside attn or ffn.
    """
    kinds = [kind.strip() for kind in units.split("+")]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(
                f"unknown kind of unit {kind!r}", f"use {', '.join(KINDS)}, combined with +"
            )
        if kinds.count(kind) > 1:
            raise UserError(f"{kind} is named twice in {units!r}", "name each kind once")
    if "block" in kinds and {"attn", "ffn"} & set(kinds):
        raise UserError(
            f"{units!r}: a block holds attention and FFN already", "use block, or attn and ffn"
        )
    return kinds


def parse_layers(layers: str) -> list[int] | None:
    """`auto` -> None, `3-5,8` -> [3, 4, 5, 8]. Raises UserError for any other form."""
    if layers.strip() == "auto":
        return None
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if not match:
            raise UserError(
                f"cannot read layers {layers!r}", "write 'auto', or ranges such as 3-28 or 2,4,8-11"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"layers {part.strip()!r} run backwards", f"write {last}-{first}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def layers_of(chosen: list[int] | None, n_layer: int, kind: str) -> list[int]:
    """The layers to route units of a kind in.

    Raises UserError for one the model does not have, and for a model with too few.
    """
    if chosen is None:
        if n_layer <= max(FIRST_ROUTED.values()):
            raise UserError(
                f"the model has only {n_layer} layers", "name the ones to route with --layers"
            )
        return list(range(FIRST_ROUTED[kind], n_layer))
    if chosen[-1] >= n_layer:
        raise UserError(
            f"there is no layer {chosen[-1]}", f"the model has layers 0 to {n_layer - 1}"
        )
    return chosen


def summary(config, n_layer: int) -> str:
    """What came out, in a table: activation of each kind, on calibration and on held-out text."""
    from mod_export.common.tables import format_table

    record = config.calibration
    rows = [
        [
            kind,
            sum(p > 0 for p in unit.threshold),
            f"{max(unit.threshold):.4f}",
            f"{record['activation'][kind]:.3f}",
            f"{record['held_out']['activation'][kind]:.3f}",
        ]
        for kind, unit in config.units.items()
    ]
    return format_table(
        ["kind", f"routed of {n_layer}", "threshold", "activation", "on held-out text"], rows
    )
