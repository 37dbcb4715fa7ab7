"""Statistics of measurements that take turns.

Times stand in arrays [repeats, turns]: a repeat is a whole prompt, or a tail of decoded tokens; its
turns are the chunks or slices in which the variants alternate. So a turn of one variant and the
same turn of another did the same work seconds apart, and their ratio is free of a machine's slow
changes.
"""

import numpy as np

QUARTILES = (0.25, 0.5, 0.75)


def total(times: np.ndarray) -> float:
    """Time of a repeat: the sum of each turn's median over the repeats, so that a disturbed turn
    does not count.
    """
    return float(np.median(times, axis=0).sum())


def ratio(times: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """times / reference. median, q1, q3: of the ratios of turns; totals: of the whole repeats."""
    q1, median, q3 = weighted_quantiles(times / reference, reference, QUARTILES)
    return {"median": median, "q1": q1, "q3": q3, "totals": total(times) / total(reference)}


def efficiency(
    ceiling: np.ndarray, mod: np.ndarray, floor: np.ndarray, activation: np.ndarray
) -> dict | None:
    """Time saved over time that could be saved at this activation, as `ratio` gives it; 1: time
    follows work.

    (ceiling - mod) / ((1 - activation) (ceiling - floor)); all arrays [repeats, turns]. None where
    nothing can be
    saved: everything is active, or the floor is no faster than the ceiling.
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
    """Quantiles of the values as if each stood there as often as its weight says: long turns count
    for more.
    """
    values, weights = np.ravel(values), np.ravel(weights)
    order = np.argsort(values)
    place = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    return [float(x) for x in np.interp(at, place, values[order])]
