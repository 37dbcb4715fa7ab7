"""Tables of a call's results, with the bounds that they must reach and what was expected.

    python scripts/gpu/report.py OUT             # text, at the end of a call
    python scripts/gpu/report.py OUT --markdown  # for docs/results/gpu.md

Ratios are of medians of one run. A row of a plan is compared with the dense row of the same ubatch
and context. The figures go into OUT/call.json too.
"""

import json
import sys
from pathlib import Path

import expect
from plans import PLANS, Lane

from mod_export.common.tables import format_table

# what a measured figure must reach: (part, figure) -> (bound, whether it is the least)
MUST = {
    ("decode", "all active / dense"): (1.05, False),
    ("prefill", "all active / dense"): (1.05, False),
    ("decode", "none active / pruned"): (1.10, False),
    ("decode", "efficiency at half"): (0.90, True),
    ("prefill", "efficiency at half"): (0.85, True),
    ("decode", "dense / half, kv"): (1.2, True),
    ("decode", "K/V memory, dense / half"): (1.8, True),
}
FROM_TOKENS = {
    "dense / half, kv": 32768,
    "K/V memory, dense / half": 8192,
    "efficiency at half": 8192,
}


def main() -> None:
    out = Path(sys.argv[1])
    markdown = "--markdown" in sys.argv
    summary = []
    if (out / "parity.json").is_file():
        print(parity_line(json.loads((out / "parity.json").read_text())))
    for name in PLANS:
        path = out / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            print(
                f"\n{name}"
                + (f", {result['left_out']} rows had no time" if result["left_out"] else "")
            )
            print(rows_table(name, result, markdown))
            for lane, why in result["failures"].items():
                print(f"{lane}: {why}")
            summary += figures(name, result["rows"])
    if summary:
        head = ["part", "figure", "model", "tokens", "ubatch", "measured", "must be", "reached"]
        print()
        print(format_table(head, [list(figure.values()) for figure in summary], markdown))
    call = out / "call.json"
    told = json.loads(call.read_text()) if call.is_file() else {}
    call.write_text(json.dumps(told | {"figures": summary}, indent=1) + "\n")


def parity_line(result: dict) -> str:
    cases = result["cases"].values()
    passed = sum(not case["failures"] for case in cases)
    worst = max((case["mean_kl"] for case in cases if "mean_kl" in case), default=float("nan"))
    return f"parity: {passed} of {result['expected']} cases passed, KL at most {worst:.1e}"


def rows_table(name: str, result: dict, markdown: bool) -> str:
    """Each row as measured, beside what was expected of this card."""
    gpus = result["machine"]["gpus"]
    card = expect.card_named(gpus[0][0]) if gpus else None
    head = ["model", "units", "tokens", "ubatch", "ms", "expected", "prefill, tokens/s", "expected"]
    head += ["K/V, MB", "GPU memory, MB", "graphs"]
    rows = []
    for row in result["rows"]:
        lane, plan = Lane(row["model"], row["way"]), PLANS[name]
        at = (row["force"], row["context"], row["ubatch"])
        expected = expect.predict(lane, plan, *at, card) if card else {}
        rows.append(
            [
                row["lane"],
                expect.FORCE_WORDS[row["force"]],
                row["context"],
                row["ubatch"],
                row["ms"],
            ]
            + [expected.get("ms"), round(row["prefill_tokens_per_s"])]
            + [round(expected["prefill_tokens_per_s"]) if card else None]
            + [round(row["kv_bytes"]["committed"] / 1e6, 1)]
            + [round(row["vram"] / 1e6) if row["vram"] else None, row["perf"].get("graphs")]
        )
    return format_table(head, rows, markdown)


def figures(name: str, rows: list[dict]) -> list[dict]:
    """The ratios of a part that a bound speaks of, and those beside them."""
    found = {(r["model"], r["way"], r["force"], r["context"], r["ubatch"]): r for r in rows}
    summary = []
    for (model, way, force, context, ubatch), row in found.items():
        if model not in ("kv", "attn", "block") or force != "none":
            continue

        def other(model: str, way: str = "segments", force: str = "none") -> dict | None:
            return found.get((model, way, force, context, ubatch))  # noqa: B023

        values = ratios(
            name,
            row,
            other("dense"),
            other("pruned"),
            other(model, way, "active"),
            other(model, way, "inactive"),
        )
        for figure, value in values.items():
            bound = MUST.get((name, figure))
            if bound and context < FROM_TOKENS.get(figure, 0):
                bound = None
            reached = (
                None if bound is None else (value >= bound[0] if bound[1] else value <= bound[0])
            )
            summary.append(
                {
                    "part": name,
                    "figure": figure,
                    "model": row["lane"],
                    "tokens": context,
                    "ubatch": ubatch,
                    "measured": value,
                    "must be": bound and f"{'>=' if bound[1] else '<='} {bound[0]}",
                    "reached": reached,
                }
            )
    return summary


def ratios(name: str, half: dict, dense, pruned, all_active, none_active) -> dict[str, float]:
    """Figures of one model at one context; a row that is missing leaves its figures out."""
    time = (
        (lambda row: 1 / row["prefill_tokens_per_s"])
        if name == "prefill"
        else (lambda row: row["ms"])
    )
    values: dict[str, float] = {}
    if dense is None:
        return values
    if all_active:
        values["all active / dense"] = time(all_active) / time(dense)
    floor = pruned if half["model"] == "block" else none_active
    if half["model"] == "block" and pruned and none_active:
        values["none active / pruned"] = time(none_active) / time(pruned)
    if half["model"] == "kv":
        values["dense / half, kv"] = time(dense) / time(half)
        kv = (row["kv_bytes"]["committed"] for row in (dense, half))
        values["K/V memory, dense / half"] = next(kv) / max(next(kv), 1)
    elif floor:
        share = half["prefill_activation" if name == "prefill" else "activation"]
        could = (1 - share) * (time(dense) - time(floor))
        if could > 0:
            values["efficiency at half"] = (time(dense) - time(half)) / could
    return values


if __name__ == "__main__":
    main()
