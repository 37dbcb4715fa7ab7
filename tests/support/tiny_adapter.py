"""A tiny trained MoD model, with LoRA and without, and its adapter, for the tests of adapters."""

import torch

from mod_export.adapter import base_identity, save
from mod_export.model import loading
from mod_export.model.lora import inject_lora
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer

IDS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(7))
UNITS = {"kv": [2, 3], "attn": [3, 4], "ffn": [1]}
TOKENIZER = byte_tokenizer()


def identity_of(base) -> dict:
    return base_identity(base, TOKENIZER, "tiny")


def fill_lora(base) -> None:
    """Fill LoRA as training would: B starts at 0, so that new LoRA does nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(order: str = "LoRA first", lora: bool = True) -> tuple[MoDModel, dict]:
    """Return a MoD model and the identity of its base.

    The LoRA of the model is filled, and its decisions lie far from its thresholds.
    """
    base = tiny.base()
    identity = identity_of(base)
    if order == "LoRA first" and lora:
        inject_lora(base, rank=4, alpha=8, seed=1)
    model = tiny.wrap(base, tiny.config(UNITS), tokenizer=TOKENIZER)
    if order == "routers first" and lora:
        inject_lora(base, rank=4, alpha=8, seed=1)
    fill_lora(base)
    tiny.place_biases(model, IDS)
    return model, identity


def save_for(source, units: dict, out, lora_for: str = "") -> MoDModel:
    """Write an adapter for a directory or a GGUF file, and return its model.

    lora_for: a text, for which LoRA is filled, and whose decisions lie far from the thresholds
    """
    base, tokenizer = loading.load(source)
    identity = base_identity(base, tokenizer, "tiny")
    ids = None
    if lora_for:
        inject_lora(base, rank=4, alpha=8, seed=1)
        fill_lora(base)
        ids = torch.tensor([tokenizer(lora_for).input_ids])
    config = tiny.config(units, base.config.num_hidden_layers)
    model = tiny.wrap(base, config, ids, tokenizer)
    save(out, model.config, model.router_tensors(), base, identity)
    return model


def saved(path, lora: bool = True, **kwargs) -> MoDModel:
    model, identity = trained(lora=lora)
    save(path, model.config, model.router_tensors(), model.base, identity, **kwargs)
    return model
