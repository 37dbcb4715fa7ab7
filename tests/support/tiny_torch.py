"""Tiny random models for tests, built on the spot.

    # a MoDModel on a random Llama; with token ids, decisions far from thresholds
    model = tiny.mod_model({"kv": [2, 3], "ffn": [4]}, ids)
    # SmolLM2's tokenizer, ready for GGUF export
    tiny.save_dir(path, {"kv": [2, 3]})
    # a token per byte and a short context, quick to train
    tiny.save_small(path, {"kv": [2, 3]})

The models are MoDModels, and `base` makes the plain Llama below them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mod_export.config import MoDConfig, UnitConfig
from mod_export.formats import hub
from mod_export.formats.gguf import GGUFFile
from mod_export.model import architectures, gguf_tokenizer
from mod_export.model.mod_model import MoDModel
from mod_export.units import Unit
from tests.support.byte_tokenizer import byte_tokenizer

N_LAYER = 6
IDS = torch.randint(3, 300, (1, 48), generator=torch.Generator().manual_seed(7))
BATCH = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(8))
UNITS = {
    "kv": {"kv": [2, 3, 5]},
    "block": {"block": [1, 3, 4]},
    "attn": {"attn": [2, 3, 5]},
    "ffn": {"ffn": [0, 2, 5]},
    "kv+block": {"kv": [1, 2, 4], "block": [2, 4, 5]},
    "kv+attn+ffn": {"kv": [2, 3], "attn": [3, 4], "ffn": [1, 3, 5]},
    "all": {"kv": [2, 3], "block": [3, 5], "attn": [4], "ffn": [0, 2, 4]},
}


def base(
    n_layer: int = N_LAYER,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_embd: int = 64,
    n_vocab: int = 300,
    tied: bool = False,
    seed: int = 0,
    n_ctx: int = 2048,
    **kwargs,
) -> LlamaForCausalLM:
    """Return a random Llama, whose weights are large enough for layers to matter.

    n_head_kv: equal to n_head it is multi-head attention.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        hidden_size=n_embd,
        intermediate_size=96,
        vocab_size=n_vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=n_ctx,
        initializer_range=0.12,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **kwargs,
    )
    return LlamaForCausalLM(config).eval()


def config(
    units: dict[str, list[int]],
    n_layer: int = N_LAYER,
    p: float = 0.5,
    heads: int = 1,
    left_out: Collection[tuple] = (),
    windows: dict[tuple, int] | None = None,
    **kwargs,
) -> MoDConfig:
    """Return the configuration of a tiny MoD model.

    units: {kind: routed layers}. heads: K/V heads that decide apart. left_out: units of these
    layers that are not routed. windows: own windows of kv units. kwargs: fields of MoDConfig, such
    as sink_tokens or kv_window.
    """
    fields = {"sink_tokens": 2, "kv_window": 8, "calibration": {"model": "tiny"}, **kwargs}
    made = {}
    for kind, layers in units.items():
        empty = UnitConfig((0.0,) * n_layer, (1.0,) * n_layer)
        if kind == "kv" and heads > 1:
            empty = UnitConfig((0.0,) * n_layer * heads, (1.0,) * n_layer * heads, heads)
        routed = [
            unit for i in layers for unit in empty.units(i, kind) if tuple(unit) not in left_out
        ]
        made[kind] = empty.with_values(dict.fromkeys(routed, p), dict.fromkeys(routed, 0.5))
    if windows:
        own = {made["kv"].index(Unit(*unit)): window for unit, window in windows.items()}
        every = range(len(made["kv"].threshold))
        window = tuple(own.get(i, fields["kv_window"]) for i in every)
        made["kv"] = replace(made["kv"], window=window)
    return MoDConfig(**fields, units=made)


def wrap(
    base_model,
    mod_config: MoDConfig,
    ids: torch.Tensor | None = None,
    tokenizer=None,
    seed: int = 0,
) -> MoDModel:
    """Return a MoDModel with random routers.

    ids: [B, T]; the biases lie in gaps between the scores of these tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    width = architectures.n_embd(base_model)
    routers = {
        unit: (torch.randn(width, generator=generator) / width**0.5, torch.zeros(1))
        for unit in mod_config.routed()
    }
    model = MoDModel.from_base(base_model, tokenizer, mod_config, routers)
    if ids is not None:
        place_biases(model, ids)
    return model


def mod_model(units: dict, ids: torch.Tensor | None = None, **kwargs) -> MoDModel:
    """Return a random Llama with routers.

    kwargs: those of `base` and of `config`.
    """
    for_config = {key: kwargs.pop(key) for key in FIELDS_OF_CONFIG if key in kwargs}
    plain = base(**kwargs)
    return wrap(plain, config(units, plain.config.num_hidden_layers, **for_config), ids)


FIELDS_OF_CONFIG = (
    "p",
    "heads",
    "left_out",
    "windows",
    "sink_tokens",
    "kv_window",
    "scale_output",
)


@torch.no_grad()
def place_biases(model: MoDModel, ids: torch.Tensor) -> None:
    """Move each bias so that the threshold lies in the widest gap of the middle scores.

    Float noise then flips no decision. The biases are placed in the order of the decisions, because
    each decision changes what later routers see.
    """
    for index, unit in enumerate(model.config.routed()):
        router = model.router(unit)
        _, trace = model(ids, trace=True)
        scores = trace.logit[..., index].flatten().sort().values
        low, high = len(scores) * 3 // 10, len(scores) * 7 // 10
        widest = low + int((scores[low + 1 : high] - scores[low : high - 1]).argmax())
        p = router.threshold
        middle = (scores[widest] + scores[widest + 1]) / 2
        router.bias += torch.logit(torch.tensor(p)) - middle


@functools.cache
def tokenizer():
    """Return SmolLM2's tokenizer.

    llama.cpp's converter knows vocabularies by their hash, so a made-up one would not do.
    """
    return gguf_tokenizer.read_tokenizer(GGUFFile.open(hub.embedded_gguf()))


def save_dir(path: Path, units: dict, ids: torch.Tensor | None = None, **kwargs) -> MoDModel:
    """Save a tiny MoD model as a directory that exports to GGUF, and return the model."""
    model = mod_model(units, ids, n_vocab=len(tokenizer()), **kwargs)
    model.tokenizer = tokenizer()
    model.save(path)
    return model


def save_small(path: Path, units: dict, **kwargs) -> MoDModel:
    """Save a tiny MoD model whose tokens are bytes, with a short context, and return the model.

    Most of the time of a training goes into the long sequences on which thresholds are chosen, and
    into logits. Both are small here.
    """
    model = mod_model(units, n_ctx=512, **kwargs)
    model.tokenizer = byte_tokenizer()
    model.save(path)
    return model


def in_pieces(model: MoDModel, ids: torch.Tensor, size: int):
    """Return logits, decisions and the cache of the sparse form, `size` tokens at a time."""
    cache = model.new_cache()
    steps = [
        model.step(ids[:, i : i + size], cache, trace=True) for i in range(0, ids.shape[1], size)
    ]
    return torch.cat([s[0] for s in steps], 1), torch.cat([s[1].active for s in steps], 1), cache


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def dense_logits(model: MoDModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return the logits [B, T, n_vocab] of the model with every unit active."""
    with model.forced("active"):
        return model(ids, **kwargs)
