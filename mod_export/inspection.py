"""What a GGUF file routes, whether it follows the schema, and how much KV memory it can be expected
to need.

Needs neither llama_cpp nor torch. The rules are those of docs/reference/gguf-schema.md, which the patched llama.cpp
enforces too.

    report = inspect("mod.gguf")      # a dict, as `mod-export inspect --json` prints it
    print(render(report))
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from mod_export.common.tables import format_table
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import schema
from mod_export.formats.gguf import F32, GGUFFile

CONTEXTS = (1000, 4000, 16000)
# the runtime's default kv_rollback: positions whose K/V stay a little longer than the window
ROLLBACK = 64
BYTES_PER_VALUE = 2  # f16, the runtime's default type of K and V
FORMULA = (
    "cells(n) of a layer = a_c * (min(n, w) + a_kv * max(0, n - w)); a_c: activation of block or attn, "
    "a_kv: of kv (1 where not routed), w = kv_window + 64 (rollback margin)"
)


def inspect(path: str | Path) -> dict:
    """Read and check a file. Raises UserError naming what is wrong with it."""
    file = GGUFFile.open(path)
    refuse_pieces(file)
    n_layer, n_embd = (model_number(file, name) for name in ("block_count", "embedding_length"))
    config = read_routers(file, n_layer, n_embd)[0]
    report = {
        "file": str(path),
        "architecture": file.architecture,
        "n_layer": n_layer,
        "n_embd": n_embd,
    }
    report |= {"bytes": Path(path).stat().st_size, "tensor_types": _types(file), "mod": None}
    if config:
        report["mod"] = {name: getattr(config, name) for name in schema.SCALARS}
        report["mod"] |= {
            "units": _units(config),
            "activation": mean_activation(config),
            "kv": _kv(file, config),
        }
    return report


def refuse_pieces(file: GGUFFile) -> None:
    """A model split over several files has to be merged before we can read or change it."""
    if file.get("split.count", 0) not in (0, 1):
        raise UserError(
            f"{file.path} is one of several pieces of a model", "merge them with llama-gguf-split"
        )


def model_number(file: GGUFFile, name: str) -> int:
    """The key {architecture}.{name}, which must be a positive whole number of a sensible size."""
    value = file.get(f"{file.architecture}.{name}")
    if not isinstance(value, int) or not 1 <= value <= 1 << 24:
        raise UserError(
            f"{file.path}: key {file.architecture}.{name} is missing or no sensible number"
        )
    return value


def read_routers(file: GGUFFile, n_layer: int, n_embd: int) -> tuple[MoDConfig | None, dict]:
    """Configuration and {(layer, kind): (w [n_embd], b [1])} of a file, (None, {}) for a dense one;
    all checked.
    """
    config = schema.from_keys(file)
    units = config.validate(n_layer).routed() if config else []
    if config and not units:
        raise UserError(f"{file.path}: the keys {schema.prefix(file.architecture)}* route no unit")
    routers = {}
    for unit in units:
        shapes = zip(schema.tensor_names(*unit), (n_embd, 1), strict=True)
        routers[unit] = tuple(_router_tensor(file, name, size) for name, size in shapes)
    expected = {name for unit in units for name in schema.tensor_names(*unit)}
    for name in file.tensors:
        if schema.ROUTER_TENSOR.fullmatch(name) and name not in expected:
            raise UserError(
                f"{file.path}: tensor {name} belongs to no routed unit", "export the model again"
            )
    return config, routers


def _router_tensor(file: GGUFFile, name: str, size: int) -> np.ndarray:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise UserError(f"{file.path}: tensor {name} is missing", "export the model again")
    if tensor.type != F32 or tensor.shape != (size,):
        raise UserError(
            f"{file.path}: tensor {name} is not f32 of shape [{size}]", "export the model again"
        )
    if not np.isfinite(tensor.array()).all():
        raise UserError(
            f"{file.path}: tensor {name} holds a value that is not finite",
            "calibrate the model again",
        )
    return tensor.array()


def mean_activation(config: MoDConfig) -> dict[str, float]:
    """Kind -> activation on calibration text, averaged over the layers where it is routed; and over
    all units.
    """
    values: dict[str, list[float]] = {}
    for layer, kind in config.routed():
        values.setdefault(kind, []).append(config.units[kind].activation[layer])
    every = [value for kind in values.values() for value in kind]
    return {kind: float(np.mean(of_kind)) for kind, of_kind in values.items()} | {
        "all": float(np.mean(every))
    }


def expected_cells(config: MoDConfig, layer: int, n: int, margin: float = 0.0) -> float:
    """Cells in use of a layer after n tokens, as FORMULA says; margin: share of activation added to
    the calibrated.
    """

    def activation(kind: str) -> float:
        return (
            min(1.0, config.units[kind].activation[layer] * (1 + margin))
            if config.threshold(layer, kind)
            else 1.0
        )

    window = min(n, config.kv_window + ROLLBACK)
    return activation("block") * activation("attn") * (window + activation("kv") * (n - window))


def _kv(file: GGUFFile, config: MoDConfig) -> dict:
    per_token = [bytes_per_token(file, layer) for layer in range(model_number(file, "block_count"))]
    rows = []
    for n in CONTEXTS:
        dense = n * sum(per_token)
        mod = sum(size * expected_cells(config, layer, n) for layer, size in enumerate(per_token))
        share = mod / dense if dense else 1.0
        rows.append({"tokens": n, "bytes_dense": dense, "bytes_mod": round(mod), "share": share})
    return {
        "formula": FORMULA,
        "type": "f16",
        "bytes_per_token_dense": sum(per_token),
        "expected": rows,
    }


def bytes_per_token(
    file: GGUFFile, layer: int, k: float = BYTES_PER_VALUE, v: float = BYTES_PER_VALUE
) -> float:
    """K and V of one token in one layer; k, v: bytes of their values, by default f16."""
    heads = _per_layer(file, "attention.head_count", layer)
    heads_kv = _per_layer(file, "attention.head_count_kv", layer, heads)
    head = model_number(file, "embedding_length") // max(1, heads)
    length_k, length_v = (
        _per_layer(file, f"attention.{name}_length", layer, head) for name in ("key", "value")
    )
    return heads_kv * (length_k * k + length_v * v)


def _per_layer(file: GGUFFile, name: str, layer: int, default: int | None = None) -> int:
    """A key that holds one whole number for all layers, or one for each."""
    value = file.get(f"{file.architecture}.{name}", default)
    if isinstance(value, np.ndarray) and layer < len(value):
        value = value[layer].item()
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"{file.path}: key {file.architecture}.{name} is missing or no whole number"
        )
    return value


def _types(file: GGUFFile) -> dict[str, int]:
    from gguf.constants import GGMLQuantizationType

    return dict(
        Counter(
            GGMLQuantizationType(tensor.type).name for tensor in file.tensors.values()
        ).most_common()
    )


def _units(config: MoDConfig) -> list[dict]:
    return [
        {"layer": layer, "kind": kind, "threshold": config.threshold(layer, kind)}
        | {"activation": config.units[kind].activation[layer]}
        for layer, kind in config.routed()
    ]


def render(report: dict) -> str:
    """The report as text for a terminal."""
    types = ", ".join(f"{count} {name}" for name, count in report["tensor_types"].items())
    head = f"{report['file']}: {report['architecture']}, {report['n_layer']} layers, n_embd {report['n_embd']}, "
    head += f"{report['bytes'] / 1e6:.1f} MB (tensors: {types})"
    mod = report["mod"]
    if mod is None:
        return f"{head}\nno routed units: an ordinary dense model"
    facts = f"Mixture-of-Depths schema {mod['version']}: {len(mod['units'])} routed units, "
    facts += f"{mod['gating_func']} scores, {'scaled' if mod['scale_output'] else 'hard'} gate, "
    facts += f"first {mod['sink_tokens']} tokens always active, kv window {mod['kv_window']}"
    means = ", ".join(f"{kind} {value:.3f}" for kind, value in mod["activation"].items())
    units = [
        [u["layer"], u["kind"], f"{u['threshold']:.4f}", f"{u['activation']:.3f}"]
        for u in mod["units"]
    ]
    kv = [
        [row["tokens"], _mb(row["bytes_dense"]), _mb(row["bytes_mod"]), f"{row['share']:.3f}"]
        for row in mod["kv"]["expected"]
    ]
    return "\n".join(
        [head, facts, "", format_table(["layer", "unit", "threshold", "activation"], units), ""]
        + [f"mean activation on calibration text: {means}", ""]
        + [
            f"expected K/V ({mod['kv']['type']}), {mod['kv']['bytes_per_token_dense']} bytes per token when dense:"
        ]
        + [format_table(["tokens", "dense", "this model", "share"], kv), "", mod["kv"]["formula"]]
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f} MB"
