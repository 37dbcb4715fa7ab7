"""The speed/quality curve of one file: time, K/V and divergence from the dense model over shifts of
the thresholds.

result = sweep("mod.gguf", "dense.gguf", Options(contexts=(2048,)), targets=(1.0, 0.5, 0.1))
result["sweep"]                            # one row per shift; result["rows"]: bench()'s rows
"""

from collections.abc import Callable
from dataclasses import replace

from mod_export.benchmark import run as benchmark
from mod_export.benchmark.processes import Worker
from mod_export.common.progress import Progress
from mod_export.errors import UserError

TARGETS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
CONTEXT = 2048
LIMIT = 12.0  # a shift at which all, or no, tokens are active: sigmoid(12) is 1 - 6e-6
CLOSE = 0.01  # what an activation may differ from its target
TRIES = 8  # for each target
SETTING = ("context", "beyond_training", "batch", "ubatch", "flash_attn", "kv_type", "shift")


def sweep(
    file,
    dense,
    options: benchmark.Options,
    targets: tuple[float, ...] | None = TARGETS,
    text: str | None = None,
    progress: Progress | None = None,
    length: int = 512,
    sequences: int = 2,
    **kwargs,
) -> dict:
    """Measures the targets' shifts, or options.shifts where targets is None, at options.contexts
    (default 2048).

    text: the prompts' and, where given, that of the comparison too, which is otherwise the packaged
    held-out text.
    length, sequences: of the comparison. kwargs: as for bench(). Returns bench()'s result with one
    more list, `sweep`.
    """
    from mod_export.data.text import default_texts
    from mod_export.runtime import bindings

    bindings.require()
    benchmark.check_files(file, dense)
    options = replace(
        options,
        contexts=options.contexts or (CONTEXT,),
        variants=tuple(
            v for v in options.variants if v in ("ceiling", "floor", "mod", "none_active")
        ),
    )
    if not {"ceiling", "mod"} <= set(options.variants):
        raise UserError("a sweep needs the variants ceiling and mod", "add them to --variants")
    if bad := [target for target in targets or () if not 0 <= target <= 1]:
        raise UserError(
            f"activation {bad[0]} is not between 0 and 1", "for example --activations 1,0.5,0.1"
        )
    benchmark.steps(options)
    progress = progress or Progress()
    setup = {
        "file": str(file),
        "text": text or default_texts()[1],
        "threads": options.threads,
        "length": length,
        "sequences": sequences,
    }
    worker = Worker("the comparison", setup, module="mod_export.benchmark.quality")
    try:
        points = (
            [worker.ask(do="measure", shift=x) for x in options.shifts]
            if targets is None
            else (find_shifts(lambda x: worker.ask(do="measure", shift=x), targets, progress))
        )
    finally:
        worker.close()
    points = sorted(
        {point["shift"]: point for point in points}.values(), key=lambda point: point["shift"]
    )
    options = replace(options, shifts=tuple(p["shift"] for p in points))
    result = benchmark.bench(file, dense, options, text, progress=progress, **kwargs)
    return result | {"sweep": join(points, result["rows"])}


def find_shifts(
    measure: Callable[[float], dict], targets: tuple[float, ...], progress: Progress
) -> list[dict]:
    """The points of `measure` that come closest to the targets, by bisection; each point serves all
    targets.

    Activation falls as the shift grows. It falls in steps where there are few tokens, so a target
    can be missed.
    """
    points = {x: measure(x) for x in (-LIMIT, LIMIT)}
    for target in progress.count("finding thresholds", targets):
        for _ in range(TRIES):
            if abs(_closest(points, target)["activation"] - target) <= CLOSE:
                break
            low = max(x for x, p in points.items() if p["activation"] >= target or x == -LIMIT)
            high = min(x for x, p in points.items() if x > low)
            points[(low + high) / 2] = measure((low + high) / 2)
    return [_closest(points, target) for target in targets]


def _closest(points: dict[float, dict], target: float) -> dict:
    return min(points.values(), key=lambda p: abs(p["activation"] - target))


def join(points: list[dict], rows: list[dict]) -> list[dict]:
    """One row per setting and shift: the comparison's figures beside the times of both phases."""
    quality = {point["shift"]: point for point in points}
    found: dict[tuple, dict] = {}
    for row in rows:
        setting = {k: row[k] for k in SETTING}
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
