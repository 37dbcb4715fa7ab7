"""MODEL -> adapter or MoD directory: load, calibrate or apply an adapter, save.

    convert("smollm2", "adapter", units="kv", target=0.5)
    convert("Qwen/Qwen3-0.6B", "mod", save="full")  # from the Hugging Face hub
    convert_adapter("smollm2", "mod", "adapter")  # trained routers and LoRA, no calibration

Knows nothing of GGUF outputs; export.py turns either into one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mod_export import __version__
from mod_export.common import extras
from mod_export.common.files import atomic_dir, check_room, remove_left
from mod_export.common.progress import stage
from mod_export.config import KV_GRANULARITY, KV_WINDOW, SINK_TOKENS
from mod_export.data.text import read_texts
from mod_export.errors import UserError
from mod_export.formats import architectures as runtime_architectures
from mod_export.formats import hf_directory, hub
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.sliding_windows import has_experts
from mod_export.units import KV, format_layers, parse_kinds, parse_layers, shares_by_kind

logger = logging.getLogger(__name__)

CHECK_TOKENS = 192  # that a GGUF file is compared on
CHECK_BATCH = 64  # tokens; logits of so many are held at once
# The mean KL between runtime and torch may be so many times that of the rounding of activations,
# which is an estimate, and so much more, because llama.cpp has GELU from a table of f16.
CHECK_TIMES = 3.0
CHECK_MARGIN = 1e-5
ADAPTER, FULL = "adapter", "full"  # what is written: the routers alone, or the weights too
BACKWARD = "the scores of its units take a backward pass through the whole model"
# Is called with a model, its tokenizer and the kinds of units, before work goes into them.
Check = Callable[[Any, Any, Collection[str]], None]


def convert(
    model: str,
    out: str | Path,
    units: str = "kv",
    target: float | dict[str, float] = 0.5,
    kv_window: int | str | None = None,
    layers: str = "auto",
    calibration_text: Sequence[str | Path] = (),
    sink_tokens: int = SINK_TOKENS,
    force: bool = False,
    revision: str | None = None,
    check: Check | None = None,
    kv_granularity: str = KV_GRANULARITY,
    calibration_tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    save: str = ADAPTER,
    run: Path | None = None,
) -> None:
    """Write a calibrated MoD model to the directory `out`, whole or not at all.

    model: a directory, a GGUF file, `smollm2` or a name on the Hugging Face hub; revision: of the
    last. target: activation, one number or {kind: number}. kv_window: "auto" gives each kv
    unit its own; by default default_window.
    kv_granularity: kv units decide for each K/V `head`, or for each `layer`. calibration_tokens: of
    the text to use; None is all. device, dtype: to compute on and in, as model/devices.py names
    them. save: `adapter` writes the routers alone, `full` the weights of the original too. check:
    what else the model has to fit. run: a folder that keeps what each layer gave, from which a
    stopped conversion with the same arguments goes on; the caller removes it. One layer is in
    memory at a time unless a kind's score needs all. Raises UserError for anything in the
    arguments, the model or the text that does not fit.
    """
    kinds = parse_kinds(units)
    parse_layers(layers, n_layer=0)  # the form alone; how many layers there are is not known yet
    for share in shares_by_kind(target, kinds).values():
        if not 0 < share < 1:  # written so that NaN fails too
            raise UserError(
                f"--target-activation {share} is not between 0 and 1", "0.5 runs half of all units"
            )
    text = read_texts(calibration_text) if calibration_text else None
    # An output in the way must fail before the minutes of work.
    with atomic_dir(out, force) as tmp:
        path = hub.locate(model, revision)
        from mod_export import adapter
        from mod_export.calibration.calibrate import calibrate
        from mod_export.calibration.measuring import CalibrationPlan
        from mod_export.calibration.run_folder import run_folder
        from mod_export.model import devices, loading
        from mod_export.model.mod_model import MoDModel
        from mod_export.model.opening import open_base

        refuse_mod(path)
        place = devices.parse_device(device)
        if save == FULL:
            check_disk(path, out)
        backward = CalibrationPlan(dict.fromkeys(kinds, ())).needs_gradients
        if run is not None and backward:
            raise UserError(
                f"a conversion for {units} cannot be resumed: {BACKWARD}",
                "leave out --resume, or use --units kv",
            )
        whole = BACKWARD if backward else ""
        base, tokenizer = open_base(model, path, dtype, place, whole, "use --units kv, or block")
        check_base(path, base, tokenizer)
        routed = layers_of_kinds(base, kinds, layers)
        if check:
            check(base, tokenizer, kinds)
        note_for_export(type(base).__name__, kinds)
        plan = CalibrationPlan(
            routed,
            target,
            None if kv_window == "auto" else kv_window or default_window(base, kinds),
            sink_tokens,
            text,
            kv_granularity=kv_granularity,
            tokens=calibration_tokens,
        )
        if run is None:
            config, routers = calibrate(base, tokenizer, plan)
        else:
            with run_folder(run, identity_of(path, base, plan)):
                remove_left(run.with_suffix(""), used=tmp)
                config, routers = calibrate(base, tokenizer, plan, run)
        config = replace(config, calibration={"model": loading.name_of(path), **config.calibration})
        logger.info(f"writing {out}")
        with stage(f"writing {out}"):
            if save == FULL:
                # The empty directory `tmp` is there already.
                MoDModel.from_base(base, tokenizer, config, routers).save(tmp, force=True)
            else:
                identity = adapter.base_identity(base, tokenizer, loading.name_of(path))
                source = hub.reference(model, revision)
                adapter.write(tmp, Path(out).name, config, routers, base, identity, model=source)
    logger.info(summary(config))


def identity_of(path: Path, base, plan) -> dict:
    """Return what a calibration depends on, of types that JSON has: files, options, versions."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    stats = [(file.name, file.stat()) for file in files]
    text = hashlib.sha256((plan.text or "").encode()).hexdigest()
    return {
        "version of mod-export": __version__,
        "model": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "--dtype": str(base.dtype),
        **asdict(plan),
        "text": text,
    }


def layers_of_kinds(base, kinds: Collection[str], layers: str) -> dict[str, list[int]]:
    """Return kind -> the layers to give units of it; `layers` as parse_layers takes it."""
    from mod_export.model import architectures

    chosen = parse_layers(layers, len(architectures.decoder_layers(base)))
    return {kind: architectures.unit_layers(base, kind, chosen) for kind in kinds}


def default_window(base, kinds: Sequence[str]) -> int | None:
    """Return the window of all kv units, None where each chooses one of OWN_WINDOWS.

    They choose where the widest is at most an eighth of the model's context. In other models the
    window is an eighth of the context, at most KV_WINDOW.
    """
    from mod_export.calibration.measuring import OWN_WINDOWS
    from mod_export.model import architectures

    eighth = max(1, (architectures.context_length(base) or 8 * max(OWN_WINDOWS)) // 8)
    if KV in kinds and max(OWN_WINDOWS) <= eighth:
        return None
    return min(KV_WINDOW, eighth)


def check_base(path: Path, base, tokenizer) -> None:
    """Raise UserError for a model that cannot have units, or that llama.cpp computes otherwise."""
    from mod_export.model import devices, loading
    from mod_export.model.role_check import check_roles

    gguf = loading.gguf_path(path)
    is_exact = base.dtype == devices.DTYPES["float32"] and base.device.type == "cpu"
    reference = base if is_exact or gguf is None else loading.open_streamed(path)[0]
    check_against_runtime(gguf, reference, tokenizer)
    check_roles(base)


def check_disk(path: Path, out: str | Path) -> None:
    """Raise UserError where there is no room for the weights of a model."""
    from mod_export.model import loading

    check_room(out, loading.written_bytes(path), str(out))


def convert_adapter(
    model: str,
    out: str | Path,
    adapter: str | Path,
    force: bool = False,
    revision: str | None = None,
    linked: bool = False,
) -> None:
    """Write `model` with an adapter, LoRA merged, to the directory `out`, whole or not at all.

    model, revision: as `convert` takes them. adapter: a directory, or the name of a packaged one.
    linked: as model/directory.py takes it. The weights are in the types that the model's files
    have. Raises UserError where the adapter is damaged or for another model.
    """
    from mod_export.formats import adapter_files

    found_at = adapter_files.resolve(adapter)
    # A bad adapter fails before torch is imported and the model loaded.
    adapter_files.read(found_at)
    with atomic_dir(out, force) as tmp:
        path = hub.locate(model, revision)
        from mod_export.adapter import apply, load, loaded_type
        from mod_export.model import devices, loading
        from mod_export.model.opening import open_base
        from mod_export.model.safetensors_weights import CannotStream

        found = load(found_at)
        if found.lora is not None or not linked:
            check_disk(path, out)
        dtype, place = loaded_type(found, path), devices.parse_device("cpu")
        base, tokenizer = open_base(model, path, dtype, place)
        check_against_runtime(loading.gguf_path(path), base, tokenizer)
        try:
            mod = apply(found, base, tokenizer)
        except CannotStream as exc:
            base, tokenizer = open_base(model, path, dtype, place, str(exc))
            mod = apply(found, base, tokenizer)
        logger.info(f"writing {out}")
        with stage(f"writing {out}"):
            # The empty directory `tmp` is there already.
            mod.save(tmp, force=True, linked=linked)


def check_against_runtime(path: Path | None, base, tokenizer) -> None:
    """Compare a model and its tokenizer with what llama.cpp makes of their GGUF file.

    path: None for a model from a directory, which needs no comparison. Without llama_cpp nothing is
    compared, and a line of the log says so. Raises UserError where the tokenizer cuts a text in
    another way, or the mean KL of the logits is larger than llama.cpp's rounding explains.
    """
    if path is None:
        return
    if not extras.is_installed("llama_cpp"):
        logger.info(f"{path.name} is not compared with llama.cpp, which is not installed")
        return
    from mod_export.model import gguf_tokenizer
    from mod_export.runtime import vocabulary

    vocabulary.check_tokenizer(path, tokenizer, gguf_tokenizer.USE_DIRECTORY)
    with stage("comparing with llama.cpp"):
        kl, rounding = compare_logits(GGUFFile.open(path), base, tokenizer)
    if not kl <= CHECK_TIMES * rounding + CHECK_MARGIN:  # written so that NaN fails too
        raise UserError(
            f"{path} gives other logits on the runtime than transformers' "
            f"{base.config.model_type} with its weights: mean KL {kl:.2g} where rounding explains "
            f"{rounding:.2g}",
            gguf_tokenizer.USE_DIRECTORY,
        )
    logger.info(f"same logits on the runtime: mean KL {kl:.2g}, rounding explains {rounding:.2g}")


def note_for_export(name: str, kinds: Sequence[str]) -> None:
    """Log where llama.cpp runs no such units on models of a class of transformers."""
    architecture = runtime_architectures.of_class(name)
    if architecture is not None:
        try:
            runtime_architectures.check(architecture, kinds)
        except UserError as error:
            logger.warning(f"note: only torch runs the model that this makes: {error.message}")


def compare_logits(file: GGUFFile, base, tokenizer) -> tuple[float, float]:
    """Return two mean KL over CHECK_TOKENS tokens of the packaged text.

    The first is that of the file on the runtime and the model in torch, the second that of the
    model with and without llama.cpp's rounding of activations. K/V are f32 on both sides.
    """
    from mod_export.data.text import bos, default_texts, tokenize
    from mod_export.metrics import kl_divergence, log_probabilities, mean_without_jumps
    from mod_export.model import architectures
    from mod_export.model.activation_rounding import batch_logits
    from mod_export.runtime.batch_logits import BatchLogitsLlama

    n = min(CHECK_TOKENS, architectures.context_length(base) or CHECK_TOKENS)
    ids = bos(tokenizer) + tokenize(tokenizer, default_texts()[0][: 20 * n])
    ids = [token for token in ids if token < base.config.vocab_size][:n]
    llm = BatchLogitsLlama(
        file.path, n_ctx=n, n_batch=CHECK_BATCH, flash_attn=False, type_k=0, type_v=0
    )
    kl, rounding = [], []
    with contextlib.closing(llm):
        for tokens, logits, rounded in batch_logits(base, file, ids, CHECK_BATCH):
            llm.eval(tokens)
            log_q = log_probabilities(logits)
            log_p = log_probabilities(logits.new_tensor(llm.logits))
            kl += kl_divergence(log_p, log_q).tolist()
            rounding += kl_divergence(log_probabilities(rounded), log_q).tolist()
    experts = has_experts(file)
    return mean_without_jumps(kl, experts), mean_without_jumps(rounding, experts)


def refuse_mod(model: str | Path) -> None:
    """Raise UserError for a MoD directory or file.

    Its routers would be lost, and its weights may be trained.
    """
    found, path = hf_directory.is_mod(model), Path(model)
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile.open(path)
        found = f"{file.architecture}.mod.version" in file.keys
    if found:
        raise UserError(
            f"{model} is a MoD model already", "convert the original, or train this one"
        )


def summary(config) -> str:
    """What came out, in a table: activation of each kind, on calibration and on held-out text."""
    from mod_export.common.tables import format_table

    record = config.calibration
    rows = [
        [
            kind,
            len(units),
            format_layers({unit.layer for unit in units}),
            f"{max(map(config.threshold, units)):.4f}",
            f"{record['activation'][kind]:.3f}",
            f"{record['held_out']['activation'][kind]:.3f}",
        ]
        for kind, units in config.by_kind().items()
    ]
    return format_table(
        ["kind", "routed units", "in layers", "threshold", "activation", "on held-out text"], rows
    )
