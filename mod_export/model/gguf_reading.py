"""A GGUF file as a model of transformers, with nothing left out.

gguf_architectures.py says for each architecture how the configuration follows from the file's keys.
Every key of the architecture is taken, or known to have no effect on the logits, or refused by
name; so is every tensor. Names of tensors are those that llama.cpp's own converter writes
(gguf-py).

    model = read_model(GGUFFile.open("model.gguf"), torch.float32)
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mod_export.errors import UserError
from mod_export.formats.drafts import layer_of
from mod_export.formats.ggml_types import enum_name
from mod_export.formats.gguf import GGUFFile, Tensor
from mod_export.formats.rotary import FREQS, LONG, SHORT
from mod_export.formats.safetensors_writing import StoredTensor, in_shards
from mod_export.formats.sliding_windows import layer_arrays, main_layers
from mod_export.model.gguf_architectures import row_of
from mod_export.model.gguf_rope import RopeFactors, rope_parameters
from mod_export.model.gguf_rows import (
    FULL,
    LAYER_NORM,
    RMS_NORM,
    SLIDING,
    Architecture,
    Layout,
)
from mod_export.model.gguf_tokenizer import USE_DIRECTORY
from mod_export.model.streaming import Change, without_weights

ROPE_TENSORS = {"freqs": FREQS, "short": SHORT, "long": LONG}
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
ONE_VALUE = {
    "attention.causal": True,
    "expert_group_count": 0,
    "expert_count": 0,
    "expert_used_count": 0,
}
WRITTEN_ROWS = 4096  # of a matrix outside of the layers, in memory at once
SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Types of tensors whose values torch has a type for.
PLAIN_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_REQUIRED = object()


def read_model(file: GGUFFile, dtype: torch.dtype) -> nn.Module:
    """Return the causal language model of a file, in eval mode, its weights dequantised.

    Raises UserError, naming the key or tensor, for what cannot be taken over.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = read_config(file)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    weights = GGUFWeights(file, model)
    with torch.no_grad():
        for name, values in _values_of(model, weights.row).items():
            values.copy_(weights.value(name))
    return model.eval()


def open_model(file: GGUFFile, dtype: torch.dtype) -> tuple[nn.Module, GGUFWeights]:
    """Return the model of a file without its weights, in eval mode, and what reads them.

    Raises UserError as read_model does.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(file)
    with without_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval(), GGUFWeights(file, model)


class GGUFWeights:
    """Reads the parameters of a model from a file, dequantised (model/streaming.py).

    Raises UserError for a tensor that the file lacks, and for one that the model has no place for.
    """

    def __init__(self, file: GGUFFile, model: nn.Module):
        self.file, self.row, self.config = file, row_of(file), model.config
        self._model, self._places = weakref.ref(model), model.state_dict(keep_vars=True)
        self._layer: tuple[str, dict[str, torch.Tensor]] = "", {}
        self._changes: dict[str, Change] = {}
        self._sources = tensor_sources(model, file)
        taken = {name for names in self._sources.values() for name in names}
        taken |= {ROPE_TENSORS[part] for part in self.row.rope_factors}
        if self.row.model_type == "gemma4_text":
            taken.add(FREQS)  # its configuration says them in another way
        taken |= {name for name in file.tensors if _is_shared(name, self.config)}
        taken |= {name for name in file.tensors if layer_of(name) >= main_layers(file)}
        if rest := sorted(set(file.tensors) - taken):
            raise UserError(
                f"{file.path}: transformers' {self.row.model_type} has no place for the tensor "
                f"{rest[0]}",
                USE_DIRECTORY,
            )

    def value(self, name: str) -> torch.Tensor:
        """Return a parameter, in float32 where the file has it."""
        place = self._places[name]
        if sources := self._sources.get(name):
            value = _value(self.file, self.row, self.config, name, place, sources)
            change = self._changes.get(name)
            return change(value.to(place.dtype)) if change else value
        if name in self._sources:
            return torch.zeros(place.shape, dtype=place.dtype)  # a bias that the file lacks
        return place  # a buffer that the configuration determines

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return parameters and buffers, in the type that the model has them in."""
        places = self._places
        return {name: self.value(name).to(places[name].dtype) for name in names}

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a matrix."""
        return self._rows(name, rows).to(self._places[name].dtype)

    def _rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        (source,) = self._sources[name]
        if _layout(name, self.row)[1] is not None:
            return self.value(name)[rows]
        return torch.from_numpy(_dequantized(self.file.tensors[source], rows.numpy()))

    def change(self, changes: Mapping[str, Change]) -> None:
        """Change parameters when they are read; see model/streaming.py."""
        self._changes = dict(changes)

    def stored(self) -> list[list[StoredTensor]]:
        """Return what transformers would write of the model, for files of a moderate size.

        What the file has quantised is in float32, as torch has no type for it.
        """
        places = self._places
        of_layers: dict[str, list[str]] = {}
        tensors, seen = [], set()
        for name, value in places.items():
            if id(value) in seen:  # the second of two tied matrices is not written
                continue
            seen.add(id(value))
            if layer := _layout(name, self.row)[0]:
                of_layers.setdefault(layer, []).append(name)
            else:
                dtype = SAFETENSORS_TYPES[self.stored_type(name)]
                values = functools.partial(self._pieces, name)
                tensors.append(StoredTensor(name, dtype, tuple(value.shape), values))
        for layer, group in of_layers.items():
            shapes = {name: torch.empty_like(places[name], device="meta") for name in group}
            for name, value in self._as_transformers(shapes).items():
                dtype = SAFETENSORS_TYPES[value.dtype]
                values = functools.partial(self._of_layer, layer, group, name)
                tensors.append(StoredTensor(name, dtype, tuple(value.shape), values))
        return in_shards(tensors)

    def _as_transformers(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors under the names, and in the form, of transformers' files."""
        from transformers.core_model_loading import revert_weight_conversion

        typed = {name: value.to(self.stored_type(name)) for name, value in values.items()}
        return revert_weight_conversion(self._model(), typed)

    def _of_layer(self, layer: str, group: list[str], name: str) -> list[memoryview]:
        """Return the bytes of a tensor; the layer that it is of stays in memory for the next."""
        if self._layer[0] != layer:
            self._layer = "", {}  # of the last layer nothing stays meanwhile
            self._layer = layer, self._as_transformers({name: self.value(name) for name in group})
        return [_bytes(self._layer[1][name])]

    def _pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor outside of the layers, a few rows at a time."""
        place, dtype = self._places[name], self.stored_type(name)
        if place.dim() < 2:
            yield _bytes(self.value(name).to(dtype))
            return
        for rows in torch.arange(len(place)).split(WRITTEN_ROWS):
            yield _bytes(self._rows(name, rows).to(dtype))

    def unchanged(self) -> list[Path]:
        """Return no file: those of a GGUF model are no files of transformers."""
        return []

    def stored_type(self, name: str) -> torch.dtype:
        """Return the smallest float type that holds a parameter as the file has it."""
        types = {
            enum_name(self.file.tensors[source].type) for source in self._sources.get(name, ())
        }
        return PLAIN_TYPES.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def _bytes(value: torch.Tensor) -> memoryview:
    return memoryview(value.contiguous().flatten().view(torch.uint8).numpy())


def _is_shared(tensor: str, config) -> bool:
    """Whether a tensor is for K/V of a layer that takes them from another."""
    shared = getattr(config, "num_kv_shared_layers", 0)
    is_kv = bool(re.match(r"blk\.\d+\.attn_(k|v|k_norm)\.", tensor))
    return is_kv and layer_of(tensor) >= config.num_hidden_layers - shared


def read_config(file: GGUFFile):
    """Return the configuration of transformers. Raises UserError for a key that it cannot take."""
    from transformers import AutoConfig

    file.refuse_split()
    row = row_of(file)
    keys = Keys(file)
    if row.prepare:
        row.prepare(keys)
    for name, value in ONE_VALUE.items():
        if name not in row.fields:
            keys.require(name, value)
    fields = dict(row.fixed) | _size_fields(file, keys)
    epsilon = float(keys.take(row.norm[0]))
    if row.norm[1]:
        fields[row.norm[1]] = epsilon
    for name, field_name in row.fields.items():
        if name in keys.rest:
            fields[field_name] = keys.take(name)
    for field_name, pattern in row.present.items():
        fields[field_name] = any(re.fullmatch(pattern, name) for name in file.tensors)
    fields |= _position_fields(file, keys, row, fields)
    if row.finish:
        row.finish(fields, keys)
    for name in (*NO_EFFECT, *row.no_effect):
        keys.rest.pop(name, None)
    keys.refuse_rest()
    fields["vocab_size"] = _tensor(file, "token_embd.weight").shape[-1]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    for kind, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        fields[f"{kind}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id")
    return AutoConfig.for_model(row.model_type, **fields)


class Keys:
    """The keys of a file's architecture, without its prefix, that nobody has taken yet.

    Layers that predict tokens further on are left out: they are none of transformers' model.
    """

    def __init__(self, file: GGUFFile):
        self.file, self.path = file, file.path
        self._prefix = f"{file.architecture}."
        self.rest = {
            name.removeprefix(self._prefix): key.value
            for name, key in file.keys.items()
            if name.startswith(self._prefix)
        }
        n_main, n_layer = main_layers(file), self.rest.get("block_count")
        if self.rest.pop("nextn_predict_layers", 0):
            self.rest["block_count"] = n_main
            for name in layer_arrays(file, n_layer):
                name = name.removeprefix(self._prefix)
                self.rest[name] = self.rest[name][:n_main]

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
    window = keys.take("attention.sliding_window", row.window)
    is_sliding = _sliding_layers(keys, row.sliding, n_layer) if window else [False] * n_layer
    kinds = [SLIDING if sliding else FULL for sliding in is_sliding]
    positions: dict[str, Any] = {"layer_types": kinds, "sliding_window": window or None}
    if row.sliding_rope == "same":
        keys.require("rope.freq_base_swa", rope["rope_theta"])
        return positions | {"rope_parameters": rope}
    if row.sliding_rope == "own" and rope["rope_type"] == "yarn":
        raise UserError(
            f"{file.path}: yarn and sliding attention do not go together", USE_DIRECTORY
        )
    base = float(keys.take("rope.freq_base_swa", 10000.0))
    if row.sliding_rope == "plain":
        base = rope["rope_theta"]
    plain = {"rope_type": "default", "rope_theta": base}
    return positions | {"rope_parameters": {FULL: rope, SLIDING: plain}}


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

    row = row_of(file)
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    return {name: _sources(name, names, row, file) for name in _values_of(model, row)}


def _values_of(model: nn.Module, row: Architecture) -> dict[str, torch.Tensor]:
    """Return the parameters of a model, and its buffers that a file holds."""
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if _layout(name, row)[1])
    return dict(model.named_parameters()) | dict(buffers)


def _layout(name: str, row: Architecture) -> tuple[str, Layout | None]:
    """Return the number of a parameter's layer, and its layout in the file; None for the usual."""
    found = re.fullmatch(r"(?:model\.layers|transformer\.(?:h|blocks))\.(\d+)\.(.+)", name)
    return (found[1], row.layouts.get(found[2])) if found else ("", None)


def _sources(parameter: str, names, row: Architecture, file: GGUFFile) -> tuple[str, ...]:
    layer, layout = _layout(parameter, row)
    if layout is not None:
        whole = f"blk.{layer}.{layout.whole}"
        if whole in file.tensors:
            return (whole,)
        sources = tuple(f"blk.{layer}.{tensor}" for tensor in layout.tensors)
    else:
        stem, _, suffix = parameter.rpartition(".")
        # The converter knows Nemotron-H and BLOOM by the names of their first files.
        first = stem.replace("model.", "backbone.", 1), stem.removeprefix("transformer.")
        mapped = next((found for at in (stem, *first) if (found := names.get_name(at))), None)
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
    file: GGUFFile, row: Architecture, config, name: str, parameter: torch.Tensor, sources
) -> torch.Tensor:
    """Return the values of a parameter in transformers' order."""
    arrays = [_dequantized(file.tensors[source]) for source in sources]
    layout = _layout(name, row)[1]
    if layout is None or layout.whole and sources[0].endswith(f".{layout.whole}"):
        array = arrays[0]
    else:
        array = layout.join(arrays, config)
    if row.swap_halves and (found := re.search(r"\.attn_([qk])\.", sources[0])):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        # Pairs are neighbours in the file; transformers has them half a head apart.
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    if row.norm_offset and layout is None and sources[0].endswith("norm.weight"):
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


def _dequantized(tensor: Tensor, some: np.ndarray | None = None) -> np.ndarray:
    """Return the values of a tensor in float32, in numpy's order of dimensions.

    some: of the first of these dimensions; None is all.
    """
    from gguf import GGMLQuantizationType, dequantize

    rows = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:0:-1], -1)
    return dequantize(rows if some is None else rows[some], GGMLQuantizationType(tensor.type))
