"""The same tokens through torch and through the runtime: do decisions and logits agree?

    result = verify("mod.gguf", "adapter/", base="smollm2")    # or a MoD directory
    print(report(result)); result["passed"]

Up to its first differing decision a sequence has been computed by the same function on both sides:
there logits must agree up to float noise. From there on the two models differ by what one token
more or less does, so logits of these positions are counted apart (`*_all` is over all positions).
In a mixture of experts float noise also decides between experts of nearly equal scores. What such a
token does without a differing decision is no fault, see Bounds and metrics.mean_without_jumps.
"""

import contextlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mod_export.common.progress import Progress, stage
from mod_export.common.tables import format_table
from mod_export.errors import UserError
from mod_export.formats import adapter_files
from mod_export.formats.ggml_types import file_type, precision
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_types import KVTypes
from mod_export.formats.sliding_windows import has_experts
from mod_export.metrics import compare_rows, mean_without_jumps
from mod_export.model import gguf_account
from mod_export.units import Unit, units_of

logger = logging.getLogger(__name__)

MIN_TOKENS = 16  # of a text, to say anything of it


@dataclass(frozen=True)
class Bounds:
    """The figures that pass.

    mean_kl: over tokens before any differing decision, None where these are too few to judge by.
    margin: how far, in logit space, a first differing decision may lie from its threshold; None for
        any distance, as in mixtures of experts, where another expert moves scores far.
    """

    decision_agreement: float
    top1_agreement: float
    mean_kl_all: float
    mean_kl: float | None = None
    margin: float | None = None


# The type of most weights is the key. f32 tests the code, the others allow for rounded weights.
BOUNDS = {
    "f32": Bounds(0.999, 0.99, 1e-2, mean_kl=1e-5, margin=1e-3),
    "f16": Bounds(0.995, 0.97, 2e-2, mean_kl=1e-3, margin=0.05),
    "q8_0": Bounds(0.98, 0.9, 5e-2),
    "lower": Bounds(0.85, 0.7, 0.5),
}

# What the torch model computes in -> the key of BOUNDS
COMPUTED = {"float32": "f32", "float16": "f16", "bfloat16": "q8_0"}

# Mean KL to the original GGUF with all units active, by the type of its weights. File and
# torch model were made from these weights; llama.cpp rounds the activations for a quantised matrix.
# The file's own rounding of the weights, by its type, comes on top.
DENSE_KL = {"f32": 1e-5, "f16": 1e-3, "q8_0": 5e-3, "lower": 1e-2}
ROUNDING_KL = {"f32": 0.0, "f16": 1e-3, "q8_0": 5e-3, "lower": 0.1}
DENSE_SIDES = ("file", "torch")


def verify(
    file,
    reference,
    text: str | None = None,
    n_tokens: int = 1024,
    length: int = 512,
    threads: int | None = None,
    dense=None,
    types: KVTypes | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    mod: str | None = None,
    base: str | Path | None = None,
) -> dict:
    """Compare on sequences of `length` tokens of the text, n_tokens in all.

    docs/reference/result-files.md has the keys of the result. f32 files run with KV in f32 and
    without flash attention, so that the code is compared and not its rounding. Others run as they
    are used, with KV in f16 and flash attention. A text that is shorter is taken whole. types: of K
    and V in any file. device, dtype: of the torch model, as model/devices.py names them. The bounds
    are those of the coarsest rounding: of weights, of K and V, or of the torch model.

    reference, base: as adapter.open_model takes them, an adapter or a MoD directory.

    dense: the GGUF file that the model came from. File and torch model, with all units active, are
    compared with it too, so that both cannot be wrong in the same way. mod: routers that are put
    beside `file`, as MoDLlama takes them.

    Raises UserError where file and directory do not hold the same units and thresholds, where
    `dense` is a file of another model, or where the text is too short to say anything.
    """
    source = adapter_files.weights_of(reference, base)
    if source == Path(reference) and not (source / "config.json").is_file():
        raise UserError(
            f"{reference} is no adapter and no model directory",
            "give the one that the file was exported from",
        )
    length = min(length, n_tokens)
    options = {"n_ctx": length, "n_batch": length, "threads": threads, "logits_all": True}
    llm, weights = _open_file(file, options | {"mod": mod}, types)
    model = _open_reference(reference, base, source, device, dtype, threads)
    computed = str(model.base.dtype).removeprefix("torch.")
    bounds = _coarsest(weights, types, computed)
    _check_same_units(llm, model, file, reference)
    if source.is_dir():
        _tell_known_differences(file, source)
    parts = _sequences(llm, text, n_tokens, length)
    original = _open_original(dense, llm, parts[0], threads) if dense else None
    experts = has_experts(GGUFFile.open(llm.model_path))
    sums = Sums(units_of(llm.units), llm.thresholds, experts)
    for part in Progress().count("comparing", parts):
        sums.add(*_reference_run(model, part), *_runtime_run(llm, part))
    result = {"file": str(file), "reference": str(reference), "weights": weights} | sums.result()
    result |= {"kv_type": str(types) if types else None, "dtype": computed, "mod": mod}
    limits = replace(BOUNDS[bounds], margin=None) if experts else BOUNDS[bounds]
    failures = judge(result, limits)
    if original is not None:
        with contextlib.closing(original):
            result["dense"] = _compare_dense(llm, model, original, parts, bounds, experts)
        failures += _judge_dense(result["dense"], model)
    return result | {
        "bounds": asdict(limits),
        "failures": failures,
        "passed": not failures,
    }


def _open_file(file, options: dict, types: KVTypes | None):
    """Return the file's MoDLlama, and the precision of its weights, a key of BOUNDS."""
    from mod_export.runtime.llama import MoDLlama

    llm = MoDLlama(file, **options, **(types.options() if types else {}))
    if not llm.units:
        raise UserError(f"{file} is a dense model", "give a MoD file, or routers with --mod")
    weights = precision(llm.metadata.get("general.file_type", ""))
    if weights == "f32" and not types:
        llm.close()
        llm = MoDLlama(file, flash_attn=False, type_k=0, type_v=0, **options)
    return llm, weights


def _open_reference(reference, base, source: Path, device: str, dtype: str, threads: int | None):
    """Return the torch model; source: the file or directory of its weights."""
    import torch

    from mod_export.adapter import open_model
    from mod_export.model import devices, loading

    with stage(f"loading {reference}"):
        place = devices.parse_device(device)
        chosen = devices.choose_dtype(dtype, loading.stored_type(source), place)
        if threads:
            torch.set_num_threads(threads)
        return open_model(reference, base, chosen).to(place)


def _sequences(llm, text: str | None, n_tokens: int, length: int) -> list[list[int]]:
    """Return sequences of `length` tokens of the text, n_tokens in all; fewer of a shorter text."""
    from mod_export.data.text import default_texts

    tokens = llm.tokenize((text or default_texts()[0]).encode())
    if len(tokens) < n_tokens:
        if len(tokens) < MIN_TOKENS:
            raise UserError(
                f"the text has {len(tokens)} tokens where {MIN_TOKENS} are needed",
                "give more text",
            )
        length = min(length, len(tokens))
        used = len(tokens) // length * length
        logger.warning(
            f"note: {used} tokens are compared, not {n_tokens}: the text has {len(tokens)}"
        )
        n_tokens = used
    return [tokens[i : i + length] for i in range(0, n_tokens - length + 1, length)]


def _coarsest(weights: str, types: KVTypes | None, computed: str) -> str:
    """The key of BOUNDS.

    weights: precision of the file's. types: of its K and V. computed: the torch model's type.
    """
    kinds = types.numbers if types else ()
    found = [weights, COMPUTED[computed], *(precision(file_type(kind)) for kind in kinds)]
    return max(found, key=list(BOUNDS).index)


def _open_original(dense, llm, tokens: list[int], threads: int | None):
    """Return the MoDLlama of the dense GGUF that the model came from.

    Raises UserError where the file has routers, or another tokenizer.
    """
    from mod_export.runtime.llama import MoDLlama

    options = {"n_ctx": llm.n_ctx(), "n_batch": llm.n_batch, "threads": threads}
    with stage(f"opening {dense}"):
        original = MoDLlama(dense, flash_attn=False, type_k=0, type_v=0, logits_all=True, **options)
    if original.units:
        raise UserError(f"{dense} has routers", "give the file that the model was made from")
    probe = llm.detokenize(tokens)
    if original.n_vocab() != llm.n_vocab() or original.tokenize(probe) != llm.tokenize(probe):
        raise UserError(f"{dense} has another tokenizer", "give the original of the same model")
    return original


def _compare_dense(
    llm, model, original, parts: list[list[int]], weights: str, experts: bool
) -> dict:
    """KL of file and torch model, with all units active, from the dense GGUF that they came from.

    parts: the tokens of each sequence. weights: the precision of the file, and of its K and V.
    experts: as for mean_without_jumps.
    """
    kind = precision(original.metadata.get("general.file_type", ""))
    llm.force = "active"
    rows: dict[str, list] = {side: [] for side in DENSE_SIDES}
    with model.forced("active"):
        for part in Progress().count("comparing with the original", parts):
            expected = _runtime_logits(original, part)
            rows["file"].append(compare_rows(expected, _runtime_logits(llm, part)))
            rows["torch"].append(compare_rows(expected, _reference_run(model, part)[0]))
    llm.force = "none"
    result = {
        "file": str(original.model_path),
        "weights": kind,
        "torch_bound": DENSE_KL[kind],
        "file_bound": DENSE_KL[kind] + ROUNDING_KL[weights],
    }
    for side, found in rows.items():
        every = np.concatenate(found)
        result[side + "_kl"] = mean_without_jumps(every[:, 0], experts)
        result[side + "_top1"] = every[:, 1].mean()
    return result


def _judge_dense(result: dict, model) -> list[str]:
    trained = not model.config.base_is_original
    return [
        f"with all units active the {side}'s KL to {result['file']} is {kl:.3g}, above "
        f"{result[f'{side}_bound']:g}" + (", as it may be for a trained model" if trained else "")
        for side in DENSE_SIDES
        if not (kl := result[f"{side}_kl"]) <= result[f"{side}_bound"]
    ]


def _check_same_units(llm, model, file, reference) -> None:
    here, there = units_of(llm.units), model.config.routed()
    if here != there:
        odd = sorted(set(here) ^ set(there))[0]
        which = file if odd in here else reference
        raise UserError(
            f"only {which} routes {odd.kind} in {odd.place}", f"export {reference} again"
        )
    for unit, p in zip(here, llm.thresholds, strict=True):
        expected = model.config.threshold(unit)
        if abs(p - expected) > 1e-6:
            raise UserError(
                f"the threshold of {unit.kind} in {unit.place} is {p:.6g} in {file}, "
                f"{expected:.6g} in {reference}",
                f"export {reference} again",
            )


def _tell_known_differences(file, directory: Path) -> None:
    """Log what a file is known to compute otherwise than the directory."""
    try:
        gguf_account.check_base(directory, GGUFFile.open(file))
    except UserError as error:
        logger.warning(f"note: {error.message}")


def _reference_run(model, tokens: list[int]):
    """Logits [T, n_vocab], decisions [T, n_units] and router logits [T, n_units] in torch."""
    import torch

    with torch.inference_mode():
        logits, trace = model(torch.tensor([tokens], device=model.base.device), trace=True)
    return (
        logits[0].float().cpu().numpy(),
        trace.active[0].cpu().numpy().astype(bool),
        trace.logit[0].float().cpu().numpy(),
    )


def _runtime_logits(llm, tokens: list[int]) -> np.ndarray:
    """Logits [T, n_vocab] in llama.cpp."""
    llm.reset()
    llm.eval(tokens)
    return llm.scores[: len(tokens)]


def _runtime_run(llm, tokens: list[int]):
    """Logits [T, n_vocab] and decisions [T, n_units] in llama.cpp."""
    llm.reset()
    with llm.recording() as batches:
        llm.eval(tokens)
    return llm.scores[: len(tokens)], np.concatenate([active for active, _ in batches]).astype(bool)


class Sums:
    """Adds up the comparison, sequence by sequence.

    rows: per position KL, same top token, mean and max difference of the logits, and whether no
    decision has differed so far. experts: as for mean_without_jumps.
    """

    def __init__(self, units: list[Unit], thresholds: list[float], experts: bool = False):
        self.units, self.experts = units, experts
        self.logit_p = np.log(thresholds) - np.log1p(-np.asarray(thresholds))
        self.same = self.decisions = self.active = 0
        self.rows: list[np.ndarray] = []
        self.first: list[dict] = []

    def add(self, logits, active, score, logits_run, active_run) -> None:
        """Add a sequence.

        Logits are [T, n_vocab], decisions and router logits [T, n_units]. The first three are the
        reference's, the others the runtime's.
        """
        differ = active != active_run
        self.same += int((~differ).sum())
        self.decisions += differ.size
        self.active += int(active_run.sum())
        n_agree = len(differ)
        if differ.any():
            n_agree = int(differ.any(1).argmax())
            unit = int(differ[n_agree].argmax())
            margin = float(abs(score[n_agree, unit] - self.logit_p[unit]))
            at = self.units[unit]
            self.first.append({"position": n_agree, **at.to_dict(), "margin": margin})
        figures = compare_rows(logits, logits_run)
        self.rows.append(np.column_stack([figures, np.arange(len(figures)) < n_agree]))

    def result(self) -> dict:
        rows = np.concatenate(self.rows)
        agree = rows[rows[:, 4] == 1] if rows[:, 4].any() else rows
        return {
            "tokens": len(rows),
            "units": len(self.units),
            "activation": self.active / self.decisions,
            "decision_agreement": self.same / self.decisions,
            "top1_agreement": rows[:, 1].mean(),
            "max_logit_diff": agree[:, 3].max(),
            "mean_logit_diff": agree[:, 2].mean(),
            "mean_kl": mean_without_jumps(agree[:, 0], self.experts),
            "max_logit_diff_all": rows[:, 3].max(),
            "mean_logit_diff_all": rows[:, 2].mean(),
            "mean_kl_all": rows[:, 0].mean(),
            "tokens_agreed": int(rows[:, 4].sum()),
            "first_disagreements": self.first,
        }


def judge(result: dict, bounds: Bounds) -> list[str]:
    """The figures that are beyond the bounds, one line each."""
    failures = [
        f"{key} {result[key]:.6g} is below {low}"
        for key in ("decision_agreement", "top1_agreement")
        if not result[key] >= (low := getattr(bounds, key))
    ]
    failures += [
        f"{key} {result[key]:.3g} is above {high}"
        for key in ("mean_kl", "mean_kl_all")
        if (high := getattr(bounds, key)) is not None and not result[key] <= high
    ]
    if bounds.margin is not None:
        failures += [
            f"the first differing decision, {d['kind']} of {_place(d)} at position "
            f"{d['position']}, lies {d['margin']:.2g} from its threshold, more than {bounds.margin}"
            for d in result["first_disagreements"]
            if not d["margin"] <= bounds.margin
        ]
    return failures


def _place(at: dict) -> str:
    return Unit(at["layer"], at["kind"], at.get("head")).place


def report(result: dict) -> str:
    """A table of the figures with their bounds, and the verdict."""
    bounds = result["bounds"]
    rows = [
        [key, result[key], bounds.get(key)]
        for key in (
            "decision_agreement",
            "top1_agreement",
            "mean_kl",
            "mean_kl_all",
            "max_logit_diff",
            "mean_logit_diff",
        )
    ]
    if dense := result.get("dense"):
        for side in DENSE_SIDES:
            name = f"mean_kl of {side} to the original"
            rows.append([name, dense[f"{side}_kl"], dense[f"{side}_bound"]])
    kv = f", K/V {result['kv_type']}" if result.get("kv_type") else ""
    torch_type = "" if result["dtype"] == "float32" else f" in {result['dtype']}"
    margins = [d["margin"] for d in result["first_disagreements"]]
    if margins:
        rows.append(["margin of first differing decisions", max(margins), bounds["margin"]])
    lines = [
        f"{result['file']} ({result['weights']}{kv}) against {result['reference']}{torch_type}: "
        f"{result['tokens']} tokens, "
        f"{result['units']} units, activation {result['activation']:.3f}; "
        f"{result['tokens_agreed']} tokens before any differing decision",
        "",
        format_table(["", "measured", "bound"], rows),
        "",
    ]
    return "\n".join(
        lines + [f"FAILED: {f}" for f in result["failures"]] + ["passed"] * result["passed"]
    )
