"""Measurements to rows: one dict per step, shift and phase, and the statistics in them.

docs/reference/result-files.md lists the keys of a row.

Times stand in arrays [repeats, turns]. A repeat is a whole prompt, or a tail of decoded tokens. Its
turns are the chunks or slices in which the variants alternate. So a turn of one variant and the
same turn of another did the same work seconds apart, and their ratio is free of slow changes of the
machine.
"""

import numpy as np

from mod_export.benchmark.measure import TURN_STEPS, Run, Step

# variant -> the variant that it is compared with
REFERENCES = {
    "dense_patched": "ceiling",
    "all_active": "ceiling",
    "none_active": "floor",
    "mod": "ceiling",
    "ceiling_split": "ceiling",
}
QUARTILES = (0.25, 0.5, 0.75)


def make_rows(
    step: Step, shift: float, groups: list[dict[str, dict[str, Run]]], n_ctx_train: int
) -> list[dict]:
    """Rows of prefill and decode.

    groups: what `measure` gave for each group of variants, the main one first.
    """
    rows = []
    for phase in ("prefill", "decode"):
        sets = [group[phase] for group in groups]
        runs = {name: run for runs in reversed(sets) for name, run in runs.items()}
        row = {
            "context": step.context,
            "batch": step.batch,
            "ubatch": step.ubatch,
            "flash_attn": step.flash_attn,
            "kv_type": step.kv_type,
            "shift": shift,
            "phase": phase,
            "beyond_training": step.context > n_ctx_train,
            **_times(step, phase, runs),
            **_ratios(sets),
        }
        if "mod" in runs:
            row |= _mod(runs["mod"])
        rows.append(row | _memory(runs))
    return rows


def _times(step: Step, phase: str, runs: dict[str, Run]) -> dict:
    """Time and speed of each variant.

    The time of prefill is per prompt, that of decode per step (one token of every sequence).
    """
    n_turns = next(iter(runs.values())).ms.shape[1]
    parts = step.batch if phase == "prefill" else n_turns * (TURN_STEPS - 1)
    tokens = step.context if phase == "prefill" else step.batch
    ms = {name: total(run.ms) / parts for name, run in runs.items()}
    out = {
        "ms": ms,
        "tokens_per_s": {name: 1e3 * tokens / x for name, x in ms.items()},
        "repeats": next(iter(runs.values())).ms.shape[0],
        "turns": n_turns,
    }
    if phase == "prefill":
        return out | {
            "ttft_ms": {
                name: ms[name] + float(np.median(run.sample_ms)) for name, run in runs.items()
            }
        }
    return out | {"ms_per_token": {name: x / step.batch for name, x in ms.items()}}


def _ratios(sets: list[dict[str, Run]]) -> dict:
    """Each comparison within a group where both sides took turns."""
    ratios, efficient = {}, {"floor": None, "none_active": None}
    for runs in sets:
        for name, reference in REFERENCES.items():
            key = f"{name}/{reference}"
            if name in runs and reference in runs and key not in ratios:
                ratios[key] = ratio(runs[name].ms, runs[reference].ms)
        for floor in efficient:
            if {"ceiling", "mod", floor} <= set(runs):
                mod = runs["mod"]
                efficient[floor] = efficiency(
                    runs["ceiling"].ms, mod.ms, runs[floor].ms, mod.activation
                )
    floor = "floor" if any("floor" in runs for runs in sets) else "none_active"
    return {
        "ratios": ratios,
        "floor": floor,
        "efficiency": efficient[floor],
        "efficiency_to_none_active": efficient["none_active"],
    }


def _mod(run: Run) -> dict:
    """What the MoD variant's counters say.

    activation: share of (token, unit) pairs that ran in this phase. work: share of the work that
    efficiency is judged by, which for `kv` units is attention to the whole context (see worker.py).
    """
    active, seen = np.sum(list(run.units.values()), axis=0)
    return {
        "activation": float(active / seen),
        "work": float(run.activation.mean()),
        "activation_by_kind": {kind: float(a / n) for kind, (a, n) in run.units.items()},
    }


def _memory(runs: dict[str, Run]) -> dict:
    return {
        "kv_bytes": {
            name: {k: run.kv[k] for k in ("dense", "used", "committed", "reserved")}
            for name, run in runs.items()
        },
        "rss_peak_bytes": {name: run.rss_peak for name, run in runs.items()},
        "vram_bytes": {name: run.vram for name, run in runs.items() if run.vram is not None},
        "perf": {name: dict(run.perf) for name, run in runs.items() if run.perf},
        "raw_ms": {name: run.ms.round(3).tolist() for name, run in runs.items()},
    }


def total(times: np.ndarray) -> float:
    """Time of a repeat, in which a disturbed turn does not count.

    It is the sum of each turn's median over the repeats.
    """
    return float(np.median(times, axis=0).sum())


def ratio(times: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """times / reference; median, q1, q3 of the ratios of turns, totals of the whole repeats."""
    q1, median, q3 = weighted_quantiles(times / reference, reference, QUARTILES)
    return {"median": median, "q1": q1, "q3": q3, "totals": total(times) / total(reference)}


def efficiency(
    ceiling: np.ndarray, mod: np.ndarray, floor: np.ndarray, activation: np.ndarray
) -> dict | None:
    """Time saved over the time that could be saved at this activation; 1 where time follows work.

    (ceiling - mod) / ((1 - activation) (ceiling - floor)), with the keys of `ratio`. All arrays are
    [repeats, turns]. None where nothing can be saved: everything is active, or the floor is no
    faster than the ceiling.
    """
    possible = (1 - activation) * (ceiling - floor)
    medians = [np.median(x, axis=0) for x in (ceiling, mod, floor, activation)]
    can_save = float(((1 - medians[3]) * (medians[0] - medians[2])).sum())
    usable = possible > 0
    if can_save <= 0 or not usable.any():
        return None
    saved = (ceiling - mod)[usable] / possible[usable]
    q1, median, q3 = weighted_quantiles(saved, possible[usable], QUARTILES)
    return {
        "median": median,
        "q1": q1,
        "q3": q3,
        "totals": float((medians[0] - medians[1]).sum()) / can_save,
    }


def weighted_quantiles(
    values: np.ndarray, weights: np.ndarray, at: tuple[float, ...]
) -> list[float]:
    """Quantiles of the values as if each stood there as often as its weight says.

    So long turns count for more.
    """
    values = np.ravel(values)
    weights = np.ravel(weights)
    order = np.argsort(values)
    position = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    return [float(x) for x in np.interp(at, position, values[order])]
