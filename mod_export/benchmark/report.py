"""A benchmark's rows as tables, plain or Markdown."""

from mod_export.common.tables import format_table
from mod_export.common.text import NO_KV_SAVED, megabytes

NAMES = {
    "ceiling": "dense, stock",
    "ceiling_split": "stock, split KV",
    "dense_patched": "dense, patched",
    "all_active": "all active",
    "mod": "MoD",
    "none_active": "none active",
    "floor": "floor",
}
ORDER = tuple(NAMES)
TITLES = {
    "prefill": "Prefill, ms per prompt",
    "decode": "Decode, ms per step (one token of each sequence)",
}


def tables(result: dict, markdown: bool = False) -> str:
    """All tables of a result of bench()."""
    rows = result["rows"]
    parts = []
    for phase, title in TITLES.items():
        mine = [row for row in rows if row["phase"] == phase]
        parts += [
            title,
            _times(mine, markdown),
            f"{phase.capitalize()}: ratios of turns, median [quartiles]",
            _ratios(mine, markdown),
        ]
    parts += ["Memory, MB", _memory(rows, markdown)]
    if any(row["perf"] for row in rows):
        parts += ["Runtime by stage, microseconds per call of llama_decode", _perf(rows, markdown)]
    if result.get("sweep"):
        parts += [
            "Speed and quality over shifts of the thresholds",
            _sweep(result["sweep"], markdown),
        ]
    return "\n\n".join(parts + _notes(result))


def _settings(rows: list[dict]) -> list[tuple[str, str]]:
    """(key, heading) of the settings that a table has to show.

    These are the context, and every setting that differs between rows.
    """
    known = [
        ("context", "context"),
        ("batch", "sequences"),
        ("ubatch", "ubatch"),
        ("kv_type", "K/V"),
        ("flash_attn", "flash attention"),
        ("shift", "shift"),
    ]
    return [(k, h) for k, h in known if k == "context" or len({row[k] for row in rows}) > 1]


def _setting_cells(row: dict, settings: list[tuple[str, str]]) -> list:
    mark = "*" if row["beyond_training"] else ""
    return [f"{row[k]}{mark}" if k == "context" and mark else row[k] for k, _ in settings]


def _present(rows: list[dict]) -> list[str]:
    return [name for name in ORDER if any(name in row["ms"] for row in rows)]


def _times(rows: list[dict], markdown: bool) -> str:
    settings, names = _settings(rows), _present(rows)
    ttft = any("ttft_ms" in row and "mod" in row["ms"] for row in rows)
    per_token = any(row["batch"] > 1 for row in rows) and not ttft
    head = [h for _, h in settings] + [NAMES[n] for n in names] + ["MoD tokens/s"]
    head += ["time to first token, MoD"] * ttft + ["MoD per token"] * per_token
    body = []
    for row in rows:
        cells = _setting_cells(row, settings) + [_number(row["ms"].get(n)) for n in names]
        cells.append(_number(row["tokens_per_s"].get("mod")))
        cells += [_number(row.get("ttft_ms", {}).get("mod"))] * ttft
        cells += [_number(row.get("ms_per_token", {}).get("mod"))] * per_token
        body.append(cells)
    return format_table(head, body, markdown)


def _ratios(rows: list[dict], markdown: bool) -> str:
    settings = _settings(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row["ratios"]))
    head = (
        [h for _, h in settings]
        + ["turns", "activation", "work"]
        + [_ratio_name(k) for k in keys]
        + ["efficiency"]
    )
    both = any(row["floor"] == "floor" and row["efficiency_to_none_active"] for row in rows)
    head += ["efficiency, to none active"] * both
    body = [
        _setting_cells(row, settings)
        + [row["turns"] * row["repeats"], _share(row.get("activation")), _share(row.get("work"))]
        + [_spread(row["ratios"].get(key)) for key in keys]
        + [_spread(row["efficiency"])]
        + [_spread(row["efficiency_to_none_active"])] * both
        for row in rows
    ]
    return format_table(head, body, markdown)


def _ratio_name(key: str) -> str:
    return " / ".join(NAMES[name] for name in key.split("/"))


def _memory(rows: list[dict], markdown: bool) -> str:
    settings, names = _settings(rows), _present(rows)
    head = [h for _, h in settings] + [
        "after",
        "KV dense",
        "used",
        "committed",
        "used / dense",
        "committed / used",
    ]
    head += [f"peak RSS {NAMES[n]}" for n in names]
    on_gpu = [n for n in names if any(n in row.get("vram_bytes", {}) for row in rows)]
    head += [f"GPU {NAMES[n]}" for n in on_gpu]
    body = []
    for row in rows:
        kv = row["kv_bytes"].get("mod")
        cells = [f"{kv[k] / 1e6:.2f}" for k in ("dense", "used", "committed")] if kv else [None] * 3
        cells += (
            [_share(kv["used"] / kv["dense"]), _share(kv["committed"] / kv["used"])]
            if kv
            else [None] * 2
        )
        sizes = [row["rss_peak_bytes"].get(n) for n in names] + [
            row["vram_bytes"].get(n) for n in on_gpu
        ]
        body.append(
            _setting_cells(row, settings)
            + [row["phase"], *cells]
            + [x and round(x / 1e6) for x in sizes]
        )
    return format_table(head, body, markdown)


def _perf(rows: list[dict], markdown: bool) -> str:
    """The table of graphs, and of microseconds by stage, for each variant of the MoD file."""
    settings = _settings(rows)
    stages = dict.fromkeys(
        k for row in rows for perf in row["perf"].values() for k in perf if k.startswith("us_")
    )
    head = [h for _, h in settings] + [
        "phase",
        "variant",
        "calls",
        "graphs/call",
        "resized",
        "reused of the rest",
    ]
    head += [f"{k.removeprefix('us_')}, us" for k in stages]
    body = []
    for row in rows:
        for name, perf in row["perf"].items():
            calls, rest = perf["decodes"], perf["graphs"] - perf["decode_resized"]
            body.append(
                [
                    *_setting_cells(row, settings),
                    row["phase"],
                    NAMES[name],
                    calls,
                    f"{perf['graphs'] / calls:.1f}",
                    perf["decode_resized"],
                    f"{perf['graphs_reused'] / rest:.4f}" if rest else None,
                    *(_number(perf[k] / calls) for k in stages),
                ]
            )
    return format_table(head, body, markdown)


def _sweep(rows: list[dict], markdown: bool) -> str:
    settings = [(k, h) for k, h in _settings(rows) if k != "shift"]
    head = [h for _, h in settings] + [
        "shift",
        "activation, held-out",
        "prefill",
        "decode",
        "KL",
        "same best token",
        "KV used / dense",
        "prefill ms",
        "of ceiling",
        "decode ms",
        "of ceiling",
    ]
    body = [
        _setting_cells(row, settings)
        + [f"{row['shift']:.3f}"]
        + [_share(row[f"activation_{k}"]) for k in ("held_out", "prefill", "decode")]
        + [row["kl"] if row["kl"] is None else f"{row['kl']:.2e}", _share(row["top1_agreement"])]
        + [_share(row["kv_share_decode"])]
        + [
            x
            for k in ("prefill", "decode")
            for x in (
                _number(row[f"ms_{k}_mod"]),
                _share(row[f"ratio_{k}"] and row[f"ratio_{k}"]["median"]),
            )
        ]
        for row in rows
    ]
    return format_table(head, body, markdown)


def _notes(result: dict) -> list[str]:
    rows, notes = result["rows"], []
    if any(row["beyond_training"] for row in rows):
        notes.append("* beyond the context of training: for timing only.")
    if any(row["floor"] == "none_active" and "none_active" in row["ms"] for row in rows):
        notes.append(
            "The floor of these units is the MoD file with none active: no dense file leaves out "
            "just them."
        )
    if any(kv["used"] == kv["dense"] for row in rows if (kv := row["kv_bytes"].get("mod"))):
        notes.append(NO_KV_SAVED)
    if states := result["about"].get("state_bytes"):
        notes.append(
            f"Beside the K/V each sequence has recurrent states, {megabytes(states)} in a dense "
            f"model and {megabytes(2 * states)} in a MoD model, whatever the context."
        )
    if work := result["about"].get("floor_prefill_work"):
        notes.append(
            f"In prefill the floor does {work:.2f} of the matrix work of the layers that remain: "
            "llama.cpp leaves out the last layer's FFN for all but the last token. Routers read "
            "that layer's result."
        )
    if any(row["kl"] is None for row in result.get("sweep", ())):
        notes.append("No KL: a file without a vocabulary has no text to be judged by.")
    return notes


def _spread(x: dict | None) -> str | None:
    return None if x is None else f"{x['median']:.3f} [{x['q1']:.3f}, {x['q3']:.3f}]"


def _number(x: float | None) -> str | None:
    if x is None:
        return None
    return f"{x:.0f}" if x >= 1000 else f"{x:.1f}" if x >= 100 else f"{x:.2f}"


def _share(x: float | None) -> str | None:
    return None if x is None else f"{x:.3f}"
