"""The weights of a Hugging Face directory, read by name: those of one layer at a time.

The files are mapped, so that what is not read takes no memory. Which tensors of the files a
parameter consists of is transformers' knowledge: most have the parameter's name, and some are
joined, such as the experts of a layer.

    weights = SafetensorsWeights(directory, base)         # base: without weights
    weights.read(["model.layers.5.mlp.up_proj.weight"])
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from mod_export.errors import UserError
from mod_export.formats import drafts, hf_directory, schema
from mod_export.formats.safetensors_writing import StoredTensor, piece_of
from mod_export.model.streaming import Change

FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CannotStream(Exception):
    """The weights of this model can only be loaded all at once; the text says why."""


class SafetensorsWeights:
    """Reads the parameters and buffers of `base` from the files of a directory.

    ignored: tensors of the files that the model has no place for, but for those of layers for
    drafts, which are written as they are. Raises UserError for a file that is missing or cut, for a
    parameter that no file has, and for one of numbers that mean nothing without a scale;
    CannotStream where transformers has to load all files at once.
    """

    def __init__(self, directory: Path, base: nn.Module):
        self.directory = directory
        self._base = weakref.ref(base)
        self.files = hf_directory.tensor_files(directory)
        self.index = hf_directory.tensor_index(self.files)
        self._open = {path: safe_open(path, framework="pt") for path in self.files}
        self._mapping, sources = _sources(base, list(self.index))
        self._places = known = base.state_dict(keep_vars=True)
        # parameter -> its tensor in the files; joined parameters -> the tensors of all of them
        self._plain: dict[str, str] = {}
        self._joined: dict[str, list[str]] = {}
        self.ignored: list[str] = []
        self._changes: dict[str, Change] = {}
        for key, (name, is_joined) in sources.items():
            if name not in known:
                if not drafts.is_draft(key, base.config.num_hidden_layers):
                    self.ignored.append(key)
            elif is_joined:
                self._joined.setdefault(name, []).append(key)
            else:
                self._plain[name] = key
        self._check_complete(known)
        self._check_types(known)

    def _check_types(self, known: dict[str, torch.Tensor]) -> None:
        """Refuse parameters of 8 bits and less: a quantisation that config.json does not name."""
        keys = {key: name for name, key in self._plain.items()}
        keys |= {key: name for name, joined in self._joined.items() for key in joined}
        for path in self.files:
            for key, about in hf_directory.safetensors_header(path).items():
                name = keys.get(key)
                floats = name is not None and known[name].is_floating_point()
                if floats and about["dtype"] not in FLOAT_TYPES:
                    raise UserError(
                        f"{path}: {key} is of the type {about['dtype']}, whose scale config.json "
                        "does not tell",
                        "get the model in bf16, f16 or f32",
                    )

    def _check_complete(self, known: dict[str, torch.Tensor]) -> None:
        """Give tied parameters the tensor of the other, and refuse what no file has."""
        by_value = {id(value): name for name, value in known.items() if name in self._plain}
        of_joins = self._names_of_joins()
        for name, value in known.items():
            if name in self._plain or name in of_joins:
                continue
            if (other := by_value.get(id(value))) is None:
                raise UserError(
                    f"{self.directory} lacks the weights {name}",
                    "it is incomplete, or of another architecture",
                )
            self._plain[name] = self._plain[other]

    def _names_of_joins(self) -> set[str]:
        """Return the parameters that joins make: each has its name, or is the second of two."""
        names = set(self._joined)
        for name in self._joined:
            for converter in self._mapping:
                targets = getattr(converter, "target_patterns", [])
                if len(targets) > 1 and targets[0] in name:
                    names |= {name.replace(targets[0], other) for other in targets}
        return names

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return parameters and buffers, in the type that the model has them in."""
        found = {name: self._value(name) for name in names if name in self._plain}
        if joined := [name for name in names if name not in found]:
            found |= self._join(joined)
        return {name: found[name] for name in names}

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a matrix."""
        return self._tensor(self._plain[name])[rows].to(self._places[name].dtype)

    def change(self, changes: Mapping[str, Change]) -> None:
        """Change parameters when they are read; see model/streaming.py."""
        for name in changes:
            if name not in self._plain:
                raise CannotStream(f"files hold {name} in several pieces")
        self._changes = dict(changes)

    def stored(self) -> list[list[StoredTensor]]:
        """Return the tensors of each file that are not ignored, in the file's types."""
        ignored, shards = set(self.ignored), []
        changed = {self._plain[name]: name for name in self._changes}
        for path in self.files:
            start = hf_directory.data_start(path)
            tensors = []
            for key, about in hf_directory.safetensors_header(path).items():
                if key not in ignored and not schema.HF_ROUTER_TENSOR.fullmatch(key):
                    begin, end = about["data_offsets"]
                    values = partial(piece_of, path, start + begin, end - begin)
                    if key in changed:
                        values = partial(self._written, changed[key], about["dtype"])
                    shape = tuple(about["shape"])
                    tensors.append(StoredTensor(key, about["dtype"], shape, values))
            if tensors:
                shards.append(tensors)
        return shards

    def unchanged(self) -> list[Path]:
        """Return the files where `stored` would leave out nothing that they hold, else none."""
        routers = any(schema.HF_ROUTER_TENSOR.fullmatch(key) for key in self.index)
        return [] if self.ignored or routers or self._changes else self.files

    def _written(self, name: str, dtype: str) -> list[memoryview]:
        """Return the bytes of a parameter that is changed, in the type of its file."""
        value = self.read([name])[name].to(FLOAT_TYPES[dtype])
        return [memoryview(value.contiguous().flatten().view(torch.uint8).numpy())]

    def _value(self, name: str) -> torch.Tensor:
        place = self._places[name]
        value = self._of_shape(name, place.shape).to(place.dtype)
        return self._changes[name](value) if name in self._changes else value

    def _of_shape(self, name: str, shape: torch.Size) -> torch.Tensor:
        value = self._tensor(self._plain[name])
        if value.shape != shape:
            raise UserError(
                f"{self.directory}: {name} has the shape {tuple(value.shape)} where "
                f"{tuple(shape)} is needed",
                "its config.json and its weights disagree; get it again",
            )
        return value

    def _tensor(self, key: str) -> torch.Tensor:
        return self._open[self.index[key]].get_tensor(key)

    def _join(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return parameters that transformers makes of several tensors.

        It puts them in their places in the model, from where they are taken.
        """
        base = self._base()
        prefixes = {name.rpartition(".")[0] for name in names}
        first = [name for name in self._joined if name.rpartition(".")[0] in prefixes]
        keys = [key for name in first for key in self._joined[name]]
        _convert(base, {key: self._open[self.index[key]].get_slice(key) for key in keys}, self)
        found = {}
        for name in names:
            path, _, last = name.rpartition(".")
            owner = base.get_submodule(path)
            value = getattr(owner, last).detach()
            if value.is_meta:
                raise UserError(
                    f"{self.directory} lacks the weights {name}",
                    "it is incomplete, or of another architecture",
                )
            if last in owner._parameters:
                meta = torch.empty_like(value, device="meta")
                owner._parameters[last] = nn.Parameter(meta, requires_grad=False)
            found[name] = value
        return found

    @property
    def mapping(self) -> list:
        """What transformers does to the names and tensors of the files."""
        return self._mapping


def _sources(base: nn.Module, keys: list[str]) -> tuple[list, dict[str, tuple[str, bool]]]:
    """Return transformers' mapping, and for each tensor of the files (parameter, is joined)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(base)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        known = base.state_dict(keep_vars=True)
        found = {}
        for key in keys:
            if schema.HF_ROUTER_TENSOR.fullmatch(key):
                continue
            name, pattern = rename_source_key(
                key, renamings, converters, base.base_model_prefix, known
            )
            if name not in known and key in known:
                name, pattern = key, None
            found[key] = name, pattern is not None
        return mapping, found
    except (ImportError, TypeError, AttributeError) as exc:
        raise CannotStream(f"this version of transformers names weights otherwise: {exc}") from exc


def _convert(base: nn.Module, tensors: dict, weights: SafetensorsWeights) -> None:
    """Let transformers put some tensors of the files in their places in the model."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = LoadStateDictConfig(dtype=base.dtype, weight_mapping=weights.mapping)
        info, _ = convert_and_load_state_dict_in_model(base, tensors, config)
    finally:
        if bars:
            logging.enable_progress_bar()
    if errors := [*info.conversion_errors.values(), *map(str, info.mismatched_keys)]:
        raise UserError(
            f"transformers cannot join weights of {weights.directory}: {errors[0]}",
            "it is damaged, or of another architecture",
        )
