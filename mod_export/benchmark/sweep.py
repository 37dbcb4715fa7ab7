"""The speed/quality curve of one file: time, K/V and divergence from dense over shifts.

    options = BenchOptions(contexts=(2048,))
    result = sweep("mod.gguf", "dense.gguf", options, targets=(1.0, 0.5, 0.1))
    result["sweep"]                            # one row per shift; result["rows"]: bench()'s rows

The shifts are those of all thresholds, in logit space.
"""

from collections.abc import Callable
from dataclasses import replace

from mod_export.benchmark.processes import Worker
from mod_export.benchmark.run import BenchOptions, bench, check_files, steps
from mod_export.common.progress import Progress
from mod_export.errors import UserError

TARGETS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
DEFAULT_CONTEXT = 2048
# A shift at which all tokens, or none, are active: sigmoid(12) is 1 - 6e-6.
MAX_SHIFT = 12.0
ACTIVATION_TOLERANCE = 0.01  # what an activation may differ from its target
MAX_TRIES = 8  # Each target has this many tries.
SETTING_KEYS = ("context", "beyond_training", "batch", "ubatch", "flash_attn", "kv_type", "shift")


def sweep(
    file,
    dense,
    options: BenchOptions,
    targets: tuple[float, ...] | None = TARGETS,
    text: str | None = None,
    progress: Progress | None = None,
    length: int = 512,
    sequences: int = 2,
    **kwargs,
) -> dict:
    """Measure at the shifts that give the targets, or at options.shifts where targets is None.

    The contexts are options.contexts, by default 2048. text: of the prompts and of the comparison,
    which without it reads the packaged held-out text. length, sequences: of the comparison. kwargs:
    as for bench(). Returns bench()'s result with one more list, `sweep`.
    """
    from mod_export.data.text import default_texts
    from mod_export.runtime import bindings

    bindings.require()
    check_files(file, dense, options.mod)
    options = _sweep_options(options, targets)
    progress = progress or Progress()
    setup = {
        "file": str(file),
        "text": text or default_texts()[1],
        "threads": options.threads,
        "mod": options.mod,
        "length": length,
        "sequences": sequences,
    }
    with Worker("the comparison", setup, module="mod_export.benchmark.quality") as worker:

        def point(shift: float) -> dict:
            return worker.ask(do="measure", shift=shift)

        if targets is None:
            points = [point(shift) for shift in options.shifts]
        else:
            points = find_shifts(point, targets, progress)
    points = sorted(
        {point["shift"]: point for point in points}.values(), key=lambda point: point["shift"]
    )
    options = replace(options, shifts=tuple(p["shift"] for p in points))
    result = bench(file, dense, options, text, progress=progress, **kwargs)
    return result | {"sweep": join(points, result["rows"])}


def _sweep_options(options: BenchOptions, targets: tuple[float, ...] | None) -> BenchOptions:
    """The options with the contexts and variants of a sweep.

    Raises UserError for options and targets that cannot be.
    """
    variants = [v for v in options.variants if v in ("ceiling", "floor", "mod", "none_active")]
    if not {"ceiling", "mod"} <= set(variants):
        raise UserError("a sweep needs the variants ceiling and mod", "add them to --variants")
    for target in targets or ():
        if not 0 <= target <= 1:
            raise UserError(
                f"activation {target} is not between 0 and 1",
                "for example --activations 1,0.5,0.1",
            )
    contexts = options.contexts or (DEFAULT_CONTEXT,)
    options = replace(options, contexts=contexts, variants=tuple(variants))
    steps(options)
    return options


def find_shifts(
    measure: Callable[[float], dict], targets: tuple[float, ...], progress: Progress
) -> list[dict]:
    """The points of `measure` that come closest to the targets, by bisection.

    Each point serves all targets. Activation falls as the shift grows. It falls in steps where
    there are few tokens, so a target can be missed.
    """
    points = {x: measure(x) for x in (-MAX_SHIFT, MAX_SHIFT)}
    for target in progress.count("finding thresholds", targets):
        for _ in range(MAX_TRIES):
            if abs(_closest(points, target)["activation"] - target) <= ACTIVATION_TOLERANCE:
                break
            low = max(x for x, p in points.items() if p["activation"] >= target or x == -MAX_SHIFT)
            high = min(x for x, p in points.items() if x > low)
            points[(low + high) / 2] = measure((low + high) / 2)
    return [_closest(points, target) for target in targets]


def _closest(points: dict[float, dict], target: float) -> dict:
    return min(points.values(), key=lambda p: abs(p["activation"] - target))


def join(points: list[dict], rows: list[dict]) -> list[dict]:
    """One row per setting and shift: figures of the comparison beside the times of both phases."""
    quality = {point["shift"]: point for point in points}
    found: dict[tuple, dict] = {}
    for row in rows:
        setting = {k: row[k] for k in SETTING_KEYS}
        point = quality[row["shift"]]
        out = found.setdefault(
            tuple(setting.values()),
            setting
            | {
                "kl": point["kl"],
                "top1_agreement": point["top1_agreement"],
                "activation_held_out": point["activation"],
            },
        )
        kv = row["kv_bytes"]["mod"]
        out |= {
            f"kv_share_{row['phase']}": kv["used"] / kv["dense"],
            f"activation_{row['phase']}": row["activation"],
            f"work_{row['phase']}": row["work"],
            f"efficiency_{row['phase']}": row["efficiency"],
            f"ratio_{row['phase']}": row["ratios"].get("mod/ceiling"),
        }
        out |= {f"ms_{row['phase']}_{name}": ms for name, ms in row["ms"].items()}
    return list(found.values())
