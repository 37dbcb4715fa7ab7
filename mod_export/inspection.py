"""What a GGUF file routes, whether it follows the schema, and the KV memory to expect of it.

Needs neither llama_cpp nor torch. The rules are those of docs/reference/gguf-schema.md, which the
patched llama.cpp enforces too.

    report = inspect("mod.gguf")      # a dict, as `mod-export inspect --json` prints it
    report = inspect("routers.gguf")  # of routers alone; the model is unknown, and so is its KV
    print(render(report))
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mod_export.common.tables import format_table
from mod_export.common.text import megabytes, short_bytes
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import architectures, ggml_types, gguf_adapter, kv_size, schema
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.gguf_adapter import GGUFAdapter
from mod_export.formats.model_checks import check_model
from mod_export.formats.recurrent_layers import recurrent_layers, state_bytes
from mod_export.formats.sliding_windows import draft_layers, main_layers
from mod_export.units import KV, format_layers

MOST_HEADS_SHOWN = 8  # in a line; of more heads the lowest and the highest value are shown
CONTEXTS_TOKENS = (1000, 4000, 16000)


def inspect(path: str | Path, mod: str | None = None) -> dict:
    """Read and check a file. Raises UserError naming what is wrong with it.

    mod: routers that are put beside it, as gguf_adapter.locate takes them.
    """
    file = GGUFFile.open(path)
    if gguf_adapter.is_adapter(file) and mod is None:
        return _inspect_adapter(gguf_adapter.read(path))
    file.refuse_split()
    check_model(file)
    file = gguf_adapter.with_routers(path, mod)
    config, _ = schema.read_routers(file)
    report = _head(file)
    report["mod"] = _mod_report(config) | {"kv": _kv_report(file, config)} if config else None
    if config and (refused := _refused(file, config)):
        report["mod"]["refused"] = refused
    if not config:
        report["possible_units"] = {
            kind: architectures.routable_layers(file, kind)
            for kind in architectures.kinds(file.architecture)
        }
        report["not_all_units"] = architectures.reason(file.architecture)
    return report


def _inspect_adapter(adapter: GGUFAdapter) -> dict:
    """The report of a file of routers, without K/V, whose size only the model's file tells."""
    return _head(adapter.file) | {
        "routers_for": adapter.base["name"],
        "mod": _mod_report(adapter.config),
    }


def _head(file: GGUFFile) -> dict:
    return {
        "file": str(file.path),
        "architecture": file.architecture,
        "n_layer": main_layers(file),
        "n_draft_layers": draft_layers(file),
        "n_embd": file.model_number("embedding_length"),
        "bytes": file.path.stat().st_size,
        "tensor_types": _tensor_types(file),
    }


def _refused(file: GGUFFile, config: MoDConfig) -> str:
    """Why the runtime refuses the routers of a file; '' where it does not."""
    try:
        architectures.check_units(file, config)
    except UserError as error:
        return error.message
    return ""


def _tensor_types(file: GGUFFile) -> dict[str, int]:
    """Name of a ggml type -> number of tensors, most frequent first."""
    names = Counter(ggml_types.enum_name(tensor.type) for tensor in file.tensors.values())
    return dict(names.most_common())


def _mod_report(config: MoDConfig) -> dict:
    report = {name: getattr(config, name) for name in schema.SCALARS}
    own_windows = KV in config.units and bool(config.units[KV].window)
    report["units"] = [
        {
            **unit.to_dict(),
            "threshold": config.threshold(unit),
            "activation": config.activation(unit),
            **({"window": config.window(unit)} if own_windows and unit.kind == KV else {}),
        }
        for unit in config.routed()
    ]
    report["activation"] = kv_size.mean_activation(config)
    return report


def _kv_report(file: GGUFFile, config: MoDConfig) -> dict:
    layers = kv_size.kv_layers(file)
    rows = []
    for n in CONTEXTS_TOKENS:
        dense = round(sum(layer.dense_bytes(n) for layer in layers))
        mod = sum(
            layer.bytes_per_token * kv_size.expected_cells(config, i, n, window=layer.window)
            for i, layer in enumerate(layers)
        )
        share = mod / dense if dense else 1.0
        rows.append({"tokens": n, "bytes_dense": dense, "bytes_mod": round(mod), "share": share})
    windows = [layer.window for layer in layers]
    return {
        "formula": "; ".join(
            [
                kv_size.FORMULA,
                *([kv_size.HEADS_FORMULA] if config.heads(KV) > 1 else []),
                *([kv_size.SLIDING_FORMULA] if any(windows) else []),
            ]
        ),
        "type": "f16",
        "windows": windows,
        "bytes_per_token_dense": sum(layer.bytes_per_token for layer in layers),
        "state_bytes": state_bytes(file),
        "state_layers": [i for i, has in enumerate(recurrent_layers(file)) if has],
        "expected": rows,
        "note": kv_size.window_note(file, config),
    }


def render(report: dict) -> str:
    """The report as text for a terminal."""
    types = ", ".join(f"{count} {name}" for name, count in report["tensor_types"].items())
    drafts = f" and {n} for drafts" if (n := report["n_draft_layers"]) else ""
    head = (
        f"{report['file']}: {report['architecture']}, {report['n_layer']} layers{drafts}, "
        f"n_embd {report['n_embd']}, {short_bytes(report['bytes'])} (tensors: {types})"
    )
    if report["mod"] is None:
        return f"{head}\nno routed units: an ordinary dense model\n{_possible(report)}"
    if "routers_for" in report:
        head += f"\nrouters alone, to be put beside a file of {report['routers_for']}"
    return "\n".join([head, *_render_mod(report["mod"])])


def _possible(report: dict) -> str:
    """Which units the model can have in which layers, as a line."""
    reason = report["not_all_units"]
    if not report["possible_units"]:
        return f"it cannot have routers: {reason}"
    places: dict[str, list[str]] = {}
    for kind, layers in report["possible_units"].items():
        is_all = len(layers) == report["n_layer"]
        where = "all layers" if is_all else f"layers {format_layers(layers)}"
        places.setdefault(where, []).append(kind)
    kinds = "; ".join(f"{', '.join(kinds)} in {where}" for where, kinds in places.items())
    return f"it can have units of kind {kinds}" + (f" ({reason})" if reason else "")


def _render_mod(mod: dict) -> list[str]:
    means = ", ".join(f"{kind} {value:.3f}" for kind, value in mod["activation"].items())
    window = f", kv window {mod['kv_window']}" if KV in mod["activation"] else ""
    return [
        f"Mixture-of-Depths schema {mod['version']}: {len(mod['units'])} routed units, "
        f"{mod['gating_func']} scores, {'scaled' if mod['scale_output'] else 'hard'} gate, "
        f"first {mod['sink_tokens']} tokens always active{window}",
        "",
        _render_units(mod["units"]),
        "",
        f"mean activation on calibration text: {means}",
        *(_render_kv(mod["kv"]) if "kv" in mod else []),
        *([f"the runtime refuses this file: {mod['refused']}"] if "refused" in mod else []),
    ]


def _render_kv(kv: dict) -> list[str]:
    about = (
        f"K/V ({kv['type']}), {kv['bytes_per_token_dense']} bytes per token when dense"
        f"{_render_windows(kv['windows'])}"
    )
    states = _render_states(kv["state_bytes"], kv["state_layers"])
    if all(row["share"] == 1 for row in kv["expected"]):
        return ["", f"{about}, and as many here", *states]
    sizes = [
        [
            row["tokens"],
            megabytes(row["bytes_dense"]),
            megabytes(row["bytes_mod"]),
            f"{row['share']:.3f}",
        ]
        for row in kv["expected"]
    ]
    return [
        "",
        f"expected {about}:",
        format_table(["tokens", "dense", "this model", "share"], sizes),
        "",
        kv["formula"],
        *states,
        *([kv["note"]] if kv["note"] else []),
    ]


def _render_states(size: int, layers: list[int]) -> list[str]:
    if not size:
        return []
    twice, once = short_bytes(2 * size), short_bytes(size)
    return [
        f"recurrent states of a sequence of any length: {twice} (dense: {once}), "
        f"in layers {format_layers(layers)}"
    ]


def _render_units(units: list[dict]) -> str:
    """A table with a line for each layer and kind; the heads of a layer share a line."""
    lines: dict[tuple, list[dict]] = {}
    for unit in units:
        lines.setdefault((unit["layer"], unit["kind"]), []).append(unit)
    columns = {"threshold": "{:.4f}", "activation": "{:.3f}", "window": "{}"}
    shown = [name for name in columns if any(name in unit for unit in units)]
    by_head = any("head" in unit for unit in units)
    rows = [
        [layer, kind]
        + (["-" if "head" not in some[0] else _heads(some)] if by_head else [])
        + [_joined([columns[name].format(u[name]) for u in some if name in u]) for name in shown]
        for (layer, kind), some in lines.items()
    ]
    return format_table(["layer", "unit", *(["heads"] if by_head else []), *shown], rows)


def _heads(units: list[dict]) -> str:
    """The numbers of heads: `0-3` of a row of them, else each."""
    heads = [unit["head"] for unit in units]
    is_row = len(heads) > 2 and heads == list(range(heads[0], heads[-1] + 1))
    return f"{heads[0]}-{heads[-1]}" if is_row else " ".join(map(str, heads))


def _joined(values: list[str]) -> str:
    """The values of some heads: one where all are the same, the range where they are many."""
    if len(set(values)) <= 1:
        return values[0] if values else "-"
    if len(values) > MOST_HEADS_SHOWN:
        ordered = sorted(values, key=float)
        return f"{ordered[0]} to {ordered[-1]}"
    return " ".join(values)


def _render_windows(windows: list[int]) -> str:
    """How many layers slide, as a part of a sentence; empty where none does."""
    sizes = sorted(set(windows) - {0})
    if not sizes:
        return ""
    n_sliding = len(windows) - windows.count(0)
    return (
        f", {n_sliding} of {len(windows)} layers keep a window of "
        f"{' or '.join(map(str, sizes))} tokens"
    )
