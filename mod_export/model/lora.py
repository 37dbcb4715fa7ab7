"""Add LoRA to a base model by PEFT, beside the routers.

Modules, files and arithmetic are PEFT's. PEFT replaces the linear modules below the decoder layers
in place. The wrapped forwards of layers.py sit on the modules above these, so LoRA and routers can
come in either order. The base keeps the PEFT model that works on it.

    parameters = inject_lora(base, rank=8, alpha=16)    # the only ones that need gradients
    with without_lora(base): ...                        # the model as it was
    merge_lora(base)                                    # a plain model again, with other weights
    add_lora(base, *read_lora(directory))               # the same, of streamed models too
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mod_export.errors import UserError
from mod_export.formats.adapter_files import LORA_CONFIG, LORA_WEIGHTS
from mod_export.formats.base_identity import ADAPTER_AGAIN
from mod_export.formats.hf_directory import read_json, safetensors_header
from mod_export.model import architectures, streaming
from mod_export.model.safetensors_weights import CannotStream
from mod_export.model.streaming import Change

# Routers of experts, linear modules that return more than one tensor. PEFT cannot replace them.
EXPERT_ROUTERS = ("Llama4Router", "PhimoeTopKRouter")
# Kernels of Mamba read the weight of its last product past PEFT's module.
PAST_LORA = ("mamba", "mixer"), "out_proj"


def inject_lora(
    base: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    seed: int | None = None,
) -> list[nn.Parameter]:
    """Add LoRA and freeze the base; returns the new parameters, float32.

    New LoRA changes no result. targets: names of linear modules (`q_proj`), by default all of the
    decoder layers. Raises UserError for a name that no such module has, for a rank below 1, and
    where the base has LoRA already.
    """
    from peft import LoraConfig

    if lora_of(base) is not None:
        raise UserError("the model has LoRA already", "merge it first")
    if rank < 1:
        raise UserError(f"a LoRA rank of {rank}", "use a whole number, at least 1")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=_targets(base, targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(
        [base.device] if base.device.type == "cuda" else [], enabled=seed is not None
    ):
        if seed is not None:
            torch.manual_seed(seed)
        _wrap(base, config)
    return [parameter for parameter in base.parameters() if parameter.requires_grad]


def attach_lora(base: nn.Module, config, tensors: dict[str, torch.Tensor]) -> None:
    """Add LoRA as read_lora gives it. Raises UserError where LoRA does not fit the model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        peft = _wrap(base, copy.deepcopy(config))
    except Exception as error:  # PEFT raises many kinds, all about what the file asks for.
        raise UserError(f"{LORA_CONFIG} does not fit the model: {error}", ADAPTER_AGAIN) from error
    expected = {
        name: tensor.shape
        for name, tensor in get_peft_model_state_dict(peft, **_NO_EMBEDDINGS).items()
    }
    wrong = {
        name
        for name in expected.keys() | tensors.keys()
        if name not in tensors or expected.get(name) != tensors[name].shape
    }
    if wrong:
        _release(base, peft.unload)
        name = min(wrong)
        what = (
            "is missing"
            if name not in tensors
            else f"of shape {list(tensors[name].shape)} does not fit the model"
        )
        raise UserError(f"{LORA_WEIGHTS}: tensor {name} {what}", ADAPTER_AGAIN)
    set_peft_model_state_dict(peft, tensors)


def add_lora(base: nn.Module, config, tensors: dict[str, torch.Tensor]) -> None:
    """Merge LoRA as read_lora gives it into the weights.

    Of a model whose layers are read when they run, each matrix is changed when it is read. Raises
    UserError as attach_lora and merge_lora do, for such a model when the matrix is read, and
    CannotStream where LoRA changes more of it than matrices of layers.
    """
    attach_lora(base, config, tensors)
    if (source := streaming.source_of(base)) is None:
        merge_lora(base)
        return
    try:
        source.change(_changes(base, config, tensors))
    finally:
        _release(base, lora_of(base).unload)


def _changes(base: nn.Module, config, tensors: dict[str, torch.Tensor]) -> dict[str, Change]:
    """Return parameter -> what LoRA makes of it. Raises CannotStream as add_lora does."""
    below = _below_layers(base)
    found = {}
    for name, module in _lora_layers(base).items():
        if id(module) not in below or not isinstance(module.get_base_layer(), _linear()):
            raise CannotStream(f"the adapter's LoRA changes {name}, which is no layer's matrix")
        found[f"{name}.weight"] = partial(_merged, module)
    if config.bias != "none" or config.lora_bias or any(".lora_" not in name for name in tensors):
        raise CannotStream("the adapter's LoRA changes more than matrices of layers")
    return found


def _merged(module, values: torch.Tensor) -> torch.Tensor:
    """Return what the LoRA of a module makes of its matrix."""
    linear = module.get_base_layer()
    linear.weight = nn.Parameter(values, requires_grad=False)
    try:
        _merge(partial(module.merge, safe_merge=True))
        return linear.weight.data
    finally:
        module.merged_adapters.clear()
        linear.weight = nn.Parameter(torch.empty_like(values, device="meta"), requires_grad=False)


@contextlib.contextmanager
def without_lora(base: nn.Module) -> Iterator[None]:
    """Let the base compute what it did before inject_lora; a base without LoRA stays as it is."""
    peft = lora_of(base)
    with peft.disable_adapter() if peft is not None else contextlib.nullcontext():
        yield


def merge_lora(base: nn.Module) -> None:
    """Add LoRA to the weights, whose modules then are the plain ones again.

    A base without LoRA stays as it is. Raises UserError where the merged weights are not finite, or
    where PEFT cannot merge.
    """
    if (peft := lora_of(base)) is not None:
        _merge(lambda: _release(base, lambda: peft.merge_and_unload(safe_merge=True)))


def _merge(how: Callable[[], object]) -> None:
    """Let PEFT merge; raise UserError where it cannot."""
    try:
        how()
    except (ValueError, NotImplementedError) as error:
        # Weights are not finite, or LoRA is of a kind that adds no constant to the weights.
        raise UserError(f"LoRA cannot be merged: {error}", ADAPTER_AGAIN) from error


def lora_of(base: nn.Module):
    """Return the PeftModel that inject_lora or attach_lora made, or None."""
    return base.__dict__.get("_lora")


def write_lora(base: nn.Module, directory: Path, name: str) -> None:
    """Write PEFT's files. name: the name of the model, which the files record."""
    peft = lora_of(base)
    # Without a name PEFT records a path of this machine.
    config = peft.peft_config["default"]
    config.base_model_name_or_path = name
    peft.save_pretrained(str(directory), **_NO_EMBEDDINGS)


def read_lora(directory: Path):
    """Return LoRA's configuration and tensors, (LoraConfig, {name: tensor}).

    Raises UserError naming what is missing or damaged.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    data = read_json(directory / LORA_CONFIG, ADAPTER_AGAIN)
    if data.get("peft_type") != "LORA":
        raise UserError(
            f"{directory / LORA_CONFIG}: peft_type is {data.get('peft_type')!r}, not LORA",
            ADAPTER_AGAIN,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT only warns of keys that it does not know.
            config = LoraConfig.from_pretrained(str(directory))
    except Exception as error:  # PEFT may raise any exception here as well.
        raise UserError(
            f"{directory / LORA_CONFIG} cannot be read: {error}", ADAPTER_AGAIN
        ) from error
    try:
        safetensors_header(directory / LORA_WEIGHTS)
        tensors = load_file(directory / LORA_WEIGHTS)
    except (SafetensorError, UserError) as error:
        raise UserError(
            f"{directory / LORA_WEIGHTS} is damaged or truncated", ADAPTER_AGAIN
        ) from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{directory / LORA_WEIGHTS}: tensor {name} holds a value that is not finite",
                ADAPTER_AGAIN,
            )
    return config, tensors


_NO_EMBEDDINGS = {
    "save_embedding_layers": False
}  # PEFT would ask the network to find out whether they changed.


def _wrap(base: nn.Module, config):
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT warns of names and types that do not matter here.
        warnings.simplefilter("ignore")
        peft = get_peft_model(base, config)
    # The PEFT model holds the base. As a submodule of the base it would be a cycle of modules, so
    # it is stored past the registry of nn.Module.
    base.__dict__["_lora"] = peft
    if streaming.source_of(base) is not None:
        _bring_to_memory(peft)
    return peft


def _bring_to_memory(peft: nn.Module) -> None:
    """Give LoRA memory of its own where PEFT has put it where the weights are: nowhere."""
    for module in _lora_layers(peft).values():
        for name in module.adapter_layer_names:
            getattr(module, name).to_empty(device="cpu")


def _lora_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's modules that have LoRA, by the names of the modules that they stand for."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in base.named_modules() if isinstance(part, LoraLayer)}


def _release(base: nn.Module, how) -> None:
    how()
    del base.__dict__["_lora"]


def _below_layers(base: nn.Module) -> set[int]:
    """Return the identities of the modules of the decoder layers."""
    layers = [part.layer for part in architectures.decoder_layers(base)]
    return {id(module) for layer in layers for module in layer.modules()}


def _linear() -> tuple[type[nn.Module], ...]:
    """Return the classes of linear modules."""
    from transformers.pytorch_utils import Conv1D  # whose matrix is transposed

    return nn.Linear, Conv1D


def _targets(base: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Return the full names of the linear modules below the decoder layers."""
    below = _below_layers(base)
    names = [
        name
        for name, module in base.named_modules()
        if id(module) in below
        and isinstance(module, _linear())
        and type(module).__name__ not in EXPERT_ROUTERS
        and not _past_lora(name)
    ]
    known = {name.rpartition(".")[2] for name in names}
    if unknown := sorted(set(wanted or ()) - known):
        raise UserError(
            f"no layer has a linear module {unknown[0]}", f"use {', '.join(sorted(known))}"
        )
    return [name for name in names if wanted is None or name.rpartition(".")[2] in wanted]


def _past_lora(name: str) -> bool:
    """Return whether kernels may read the weight of a linear module themselves."""
    parents, last = PAST_LORA
    *_, parent, own = ["", *name.split(".")]
    return parent in parents and own == last
