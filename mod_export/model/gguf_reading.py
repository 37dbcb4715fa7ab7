"""A GGUF file as a model of transformers, with nothing left out.

ARCHITECTURES says for each architecture how the configuration follows from the file's keys. Every
key of the architecture is taken, or known to have no effect on the logits, or refused by name; so
is every tensor. What a key means is what llama.cpp makes of it. Names of tensors are those that its
own converter writes (gguf-py).

    model = read_model(GGUFFile.open("model.gguf"), torch.float32)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile, Tensor
from mod_export.formats.rotary import FREQS, LONG, SHORT
from mod_export.model.gguf_rope import RopeFactors, rope_parameters
from mod_export.model.gguf_tokenizer import USE_DIRECTORY

RMS_NORM = "attention.layer_norm_rms_epsilon"
LAYER_NORM = "attention.layer_norm_epsilon"
ROPE_TENSORS = {"freqs": FREQS, "short": SHORT, "long": LONG}
# Parameters of the experts, which transformers keeps in one matrix -> the file's tensors.
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
# Keys that change no logits, and keys whose only value here is the one given.
NO_EFFECT = (
    # An architecture reads one of the two, which is taken before this list counts.
    RMS_NORM,
    LAYER_NORM,
    "vocab_size",  # The matrix of the embedding has the number of rows.
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    # Only architectures that are not in the table read these.
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
)
ONE_VALUE = {"attention.causal": True, "nextn_predict_layers": 0, "expert_group_count": 0}
_REQUIRED = object()


@dataclass(frozen=True)
class Architecture:
    """How the configuration of transformers follows from a file.

    model_type: transformers' name
    norm: key of the norms' epsilon, and its field
    fields: more keys -> fields; a key that is missing leaves the field out
    fixed: fields whose value llama.cpp's graph fixes, or takes where the key is missing
    present: fields that are true where the file has a tensor of this pattern
    sliding: of so many layers each last one has full attention, where the file does not say; 0 for
        architectures that llama.cpp runs without sliding attention
    finish: changes the fields once all are known
    swap_halves: q and k have the order of interleaved pairs in the file
    norm_offset: what transformers adds to the weight of a norm, and the file has added already
    rope_factors: the tensors of ROPE_TENSORS that llama.cpp reads
    no_effect: keys without effect, beside those of every architecture
    """

    model_type: str
    norm: tuple[str, str] = (RMS_NORM, "rms_norm_eps")
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    sliding: int = 0
    finish: Callable[[dict[str, Any]], None] | None = None
    swap_halves: bool = False
    norm_offset: float = 0.0
    rope_factors: tuple[str, ...] = ()
    no_effect: tuple[str, ...] = ()


def _gemma(large: int) -> Callable[[dict[str, Any]], None]:
    """Set the scale of attention scores, which llama.cpp knows by the number of layers.

    A bound of 0 on the logits means none.
    """

    def finish(fields: dict[str, Any]) -> None:
        per_head = fields["hidden_size"] // fields["num_attention_heads"]
        is_large = fields["num_hidden_layers"] == large
        fields["query_pre_attn_scalar"] = per_head if is_large else fields["head_dim"]
        fields["final_logit_softcapping"] = fields.get("final_logit_softcapping") or None

    return finish


def _stablelm_residual(fields: dict[str, Any]) -> None:
    fields["use_parallel_residual"] = not fields.pop("ffn_norm")


_ATTENTION_BIAS = {"attention_bias": r"blk\.\d+\.attn_(q|k|v|output)\.bias"}
_MLP_BIAS = {"mlp_bias": r"blk\.\d+\.ffn_(gate|up|down)\.bias"}
_MIXTURE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

# general.architecture -> row. Sources: src/models/*.cpp and conversion/*.py of llama.cpp.
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        present=_ATTENTION_BIAS | _MLP_BIAS,
        swap_halves=True,
        rope_factors=("freqs", "short", "long"),
    ),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe", fields=_MIXTURE, fixed=_ALL_SPARSE | {"norm_topk_prob": False}
    ),
    "qwen3": Architecture("qwen3", present=_ATTENTION_BIAS),
    "qwen3moe": Architecture(
        "qwen3_moe",
        fields=_MIXTURE,
        fixed=_ALL_SPARSE | {"norm_topk_prob": True},
        present=_ATTENTION_BIAS,
    ),
    "phi3": Architecture(
        "phi3",
        rope_factors=("short", "long"),
        no_effect=("attention.sliding_window",),  # llama.cpp runs phi3 without it
    ),
    "stablelm": Architecture(
        "stablelm",
        norm=(LAYER_NORM, "layer_norm_eps"),
        present={
            "use_qkv_bias": r"blk\.\d+\.attn_(q|k|v)\.bias",
            "ffn_norm": r"blk\.\d+\.ffn_norm\.weight",
        },
        finish=_stablelm_residual,
        no_effect=("use_parallel_residual",),  # The FFN's norm says it.
    ),
    "nemotron": Architecture(
        "nemotron",
        norm=(LAYER_NORM, "norm_eps"),
        present=_ATTENTION_BIAS | _MLP_BIAS,
        norm_offset=1.0,
    ),
    "gemma2": Architecture(
        "gemma2",
        fields={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        present=_ATTENTION_BIAS,
        sliding=2,
        finish=_gemma(large=46),
        norm_offset=1.0,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        fields={"final_logit_softcapping": "final_logit_softcapping"},
        present=_ATTENTION_BIAS,
        sliding=6,
        finish=_gemma(large=62),
        norm_offset=1.0,
    ),
}


def read_model(file: GGUFFile, dtype: torch.dtype) -> nn.Module:
    """Return the causal language model of a file, in eval mode, its weights dequantised.

    Raises UserError, naming the key or tensor, for what cannot be taken over.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    row = architecture(file)
    config = read_config(file)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    sources = tensor_sources(model, file)
    taken = {name for names in sources.values() for name in names}
    taken |= {ROPE_TENSORS[part] for part in row.rope_factors}
    if rest := sorted(set(file.tensors) - taken):
        raise UserError(
            f"{file.path}: transformers' {row.model_type} has no place for the tensor {rest[0]}",
            USE_DIRECTORY,
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if sources[name]:
                parameter.copy_(_value(file, row, config, name, parameter, sources[name]))
            else:
                parameter.zero_()  # a bias that the file lacks
    return model.eval()


def architecture(file: GGUFFile) -> Architecture:
    """Return the row of a file. Raises UserError where the table has none."""
    if file.architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: GGUF files of the architecture {file.architecture} cannot be read",
            f"{USE_DIRECTORY}; files of {', '.join(ARCHITECTURES)} can be read",
        )
    return ARCHITECTURES[file.architecture]


def read_config(file: GGUFFile):
    """Return the configuration of transformers. Raises UserError for a key that it cannot take."""
    from transformers import AutoConfig

    file.refuse_split()
    row = architecture(file)
    keys = Keys(file)
    for name, value in ONE_VALUE.items():
        keys.require(name, value)
    fields = dict(row.fixed) | _size_fields(file, keys)
    fields[row.norm[1]] = float(keys.take(row.norm[0]))
    for name, field_name in row.fields.items():
        if name in keys.rest:
            fields[field_name] = keys.take(name)
    if "num_experts" not in fields:
        keys.require("expert_count", 0)
        keys.require("expert_used_count", 0)
    for field_name, pattern in row.present.items():
        fields[field_name] = any(re.fullmatch(pattern, name) for name in file.tensors)
    fields |= _position_fields(file, keys, row, fields)
    if row.finish:
        row.finish(fields)
    for name in (*NO_EFFECT, *row.no_effect):
        keys.rest.pop(name, None)
    keys.refuse_rest()
    fields["vocab_size"] = _tensor(file, "token_embd.weight").shape[-1]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    for kind, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        fields[f"{kind}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id")
    return AutoConfig.for_model(row.model_type, **fields)


class Keys:
    """The keys of a file's architecture, without its prefix, that nobody has taken yet."""

    def __init__(self, file: GGUFFile):
        self.path = file.path
        self._prefix = f"{file.architecture}."
        self.rest = {
            name.removeprefix(self._prefix): key.value
            for name, key in file.keys.items()
            if name.startswith(self._prefix)
        }

    def name(self, key: str) -> str:
        """Return the whole name of a key."""
        return self._prefix + key

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return the value of a key, the one value of all layers where it has a value for each.

        Raises UserError where it is missing and there is no default, or where layers differ.
        """
        if (value := self.rest.pop(key, default)) is _REQUIRED:
            raise UserError(f"{self.path} lacks the key {self.name(key)}", "get the file again")
        if not isinstance(value, np.ndarray):
            return value
        if not len(value) or (value != value[0]).any():
            raise self._refusal(key, "a value for each layer")
        return value[0].item()

    def require(self, key: str, value: Any) -> None:
        """Take a key that may be missing. Raises UserError where it has another value."""
        if (found := self.take(key, value)) != value:
            raise self._refusal(key, found)

    def refuse_rest(self) -> None:
        """Raise UserError naming the first key that nobody has taken."""
        for key, value in self.rest.items():
            raise self._refusal(key, f"{len(value)} values" if hasattr(value, "size") else value)

    def _refusal(self, key: str, value: Any) -> UserError:
        return UserError(
            f"{self.path}: the key {self.name(key)} = {value} has no counterpart in transformers",
            USE_DIRECTORY,
        )


def _size_fields(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the fields that every architecture has, and take their keys."""
    fields = {
        "max_position_embeddings": keys.take("context_length"),
        "num_hidden_layers": keys.take("block_count"),
        "hidden_size": keys.take("embedding_length"),
        "num_attention_heads": keys.take("attention.head_count"),
    }
    if (width := keys.take("feed_forward_length", 0)) != 0:
        fields["intermediate_size"] = width
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = keys.take("attention.head_count_kv", heads)
    usual = fields["hidden_size"] // max(heads, 1)
    fields["head_dim"] = keys.take("attention.key_length", usual)
    keys.require("attention.value_length", fields["head_dim"])
    for name, value in fields.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{file.path} says {name} = {value}", "get the file again")
    return fields


def _position_fields(
    file: GGUFFile, keys: Keys, row: Architecture, fields: dict[str, Any]
) -> dict[str, Any]:
    """Return what follows from positions: rotary embedding and sliding attention."""
    n_layer, context = fields["num_hidden_layers"], fields["max_position_embeddings"]
    head_dim = fields["head_dim"]
    n_rot = keys.take("rope.dimension_count", head_dim)
    found = {
        part: _dequantized(file.tensors[ROPE_TENSORS[part]])
        for part in row.rope_factors
        if ROPE_TENSORS[part] in file.tensors
    }
    rope = rope_parameters(keys, RopeFactors(**found), n_rot, head_dim, context)
    if not row.sliding:
        return {"rope_parameters": rope}
    window = keys.take("attention.sliding_window", 4096 if row.model_type == "gemma2" else 0)
    is_sliding = _sliding_layers(keys, row.sliding, n_layer) if window else [False] * n_layer
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]
    positions: dict[str, Any] = {"layer_types": kinds}
    if window:
        positions["sliding_window"] = window
    base = rope["rope_theta"]
    if row.model_type == "gemma2":
        keys.require("rope.freq_base_swa", base)
        return positions | {"rope_parameters": rope}
    if rope["rope_type"] == "yarn":
        raise UserError(
            f"{file.path}: yarn and sliding attention do not go together", USE_DIRECTORY
        )
    local = float(keys.take("rope.freq_base_swa", 10000.0))
    plain = {"rope_type": "default", "rope_theta": local}
    return positions | {"rope_parameters": {"full_attention": rope, "sliding_attention": plain}}


def _sliding_layers(keys: Keys, every: int, n_layer: int) -> list[bool]:
    """Return whether each layer has sliding attention.

    Source: load_swa_pattern in src/llama-model.cpp of llama.cpp.
    """
    value = keys.rest.pop("attention.sliding_window_pattern", every)
    if isinstance(value, np.ndarray):
        return [bool(sliding) for sliding in value[:n_layer]]
    return [value != 0 and layer % value < value - 1 for layer in range(n_layer)]


def tensor_sources(model: nn.Module, file: GGUFFile) -> dict[str, tuple[str, ...]]:
    """Return the file's tensors that each parameter of the model consists of.

    A bias that the file lacks has none. Raises UserError for a weight that the file lacks.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    return {name: _sources(name, names, file) for name, _ in model.named_parameters()}


def _sources(parameter: str, names, file: GGUFFile) -> tuple[str, ...]:
    if found := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\w+)", parameter):
        sources = tuple(f"blk.{found[1]}.{part}.weight" for part in EXPERTS[found[2]])
    else:
        stem, _, suffix = parameter.rpartition(".")
        mapped = names.get_name(stem)
        sources = (f"{mapped}.{suffix}" if mapped else parameter,)
    lacking = [name for name in sources if name not in file.tensors]
    if not lacking:
        return sources
    if parameter.endswith(".bias"):
        return ()
    raise UserError(
        f"{file.path} lacks the tensor {lacking[0]}",
        "it is incomplete, or of another architecture",
    )


def _value(
    file: GGUFFile, row: Architecture, config, name: str, parameter: nn.Parameter, sources
) -> torch.Tensor:
    """Return the values of a parameter in transformers' order."""
    arrays = [_dequantized(file.tensors[source]) for source in sources]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    if row.swap_halves and (found := re.search(r"\.attn_([qk])\.", sources[0])):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        # Pairs are neighbours in the file; transformers has them half a head apart.
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    if row.norm_offset and sources[0].endswith("norm.weight"):
        array = array - np.float32(row.norm_offset)
    if _solid(array.shape) != _solid(parameter.shape):
        raise UserError(
            f"{file.path}: the tensor {sources[0]} has the shape {array.shape} where "
            f"{tuple(parameter.shape)} is needed",
            "its keys and tensors disagree; get the file again",
        )
    return torch.from_numpy(np.require(array, requirements="CW")).reshape(parameter.shape)


def _solid(shape) -> tuple[int, ...]:
    """The dimensions that are more than 1."""
    return tuple(size for size in shape if size != 1)


def _tensor(file: GGUFFile, name: str) -> Tensor:
    if name not in file.tensors:
        raise UserError(f"{file.path} lacks the tensor {name}", "get the file again")
    return file.tensors[name]


def _dequantized(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor in float32, in numpy's order of dimensions."""
    from gguf import GGMLQuantizationType, dequantize

    rows = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:0:-1], -1)
    return dequantize(rows, GGMLQuantizationType(tensor.type))
