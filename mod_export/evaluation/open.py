"""Opens the models that `mod-export eval` measures: directories in torch, GGUF files in llama.cpp.

Example:

    pair = open_pair("mod.gguf")
    pair = open_pair("mod/", dense="smollm2")
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from mod_export import adapter
from mod_export.common.progress import stage
from mod_export.data.text import same_tokens
from mod_export.errors import UserError
from mod_export.evaluation.readers import Pair, Reader, TorchReader
from mod_export.formats import adapter_files, hub
from mod_export.formats.hf_directory import is_mod
from mod_export.formats.kv_types import KVTypes
from mod_export.model import devices, loading
from mod_export.model.mod_model import MoDModel


def open_pair(
    target,
    dense=None,
    shift: float = 0.0,
    threads: int | None = None,
    device: str = "cpu",
    gpu_layers: int = 0,
    types: KVTypes | None = None,
    dtype: str = "auto",
    mod: str | None = None,
    base: str | Path | None = None,
) -> Pair:
    """Open the model that is to be measured, and the one that it is compared with.

    target: an adapter, a MoD directory, a plain Hugging Face directory, `smollm2`, or a GGUF file,
    MoD or dense. base: of an adapter, as adapter.open_model takes it. dense: any of these, by
    default target with every unit active. shift: of all thresholds of target, in logit space.
    device, dtype: of models in torch, as model/devices.py names them. gpu_layers: of GGUF files, -1
    for all. types: of K and V of target, a GGUF file; the other model keeps the usual ones. mod:
    routers that are put beside target, a dense GGUF file. Raises UserError for a model that cannot
    be opened, and for two that do not have the same tokens.
    """
    reader = open_reader(target, shift, threads, device, gpu_layers, types, dtype, mod, base)
    if dense is None:
        return Pair(reader.dense(), reader) if reader.units else Pair(reader, None)
    other = open_reader(dense, 0.0, threads, device, gpu_layers, dtype=dtype)
    if other.units:
        other = other.dense()
    _check_same_tokens(other, reader)
    return Pair(other, reader)


def open_reader(
    path,
    shift: float = 0.0,
    threads: int | None = None,
    device: str = "cpu",
    gpu_layers: int = 0,
    types: KVTypes | None = None,
    dtype: str = "auto",
    mod: str | None = None,
    base: str | Path | None = None,
) -> Reader:
    """Open one model; the arguments are those of `open_pair`. Raises UserError likewise."""
    if not math.isfinite(shift):
        raise UserError(f"threshold shift {shift} is not a number", "for example 0.5")
    path = adapter_files.find(path) or hub.locate(path)
    weights = adapter_files.weights_of(path, base)
    if path.is_file():
        _refuse_options_of_torch(path, device, dtype)
        # Models in torch open without llama.cpp.
        from mod_export.evaluation.runtime_reader import RuntimeReader

        with stage(f"loading {path}"):
            reader: Reader = RuntimeReader(
                path, shift=shift, threads=threads, gpu_layers=gpu_layers, types=types, mod=mod
            )
    else:
        _refuse_options_of_files(path, types, mod)
        if threads:
            torch.set_num_threads(threads)
        reader = _open_directory(path, weights, base, shift, device, dtype)
    if shift and not reader.units:
        raise UserError(
            f"{path} is a dense model, so it has no thresholds to shift",
            "leave out --threshold-shift",
        )
    return reader


def _refuse_options_of_torch(path: Path, device: str, dtype: str) -> None:
    if device != "cpu":
        raise UserError(
            f"--device {device} is of models in torch, and {path} is a file", "use --gpu-layers"
        )
    if dtype != "auto":
        raise UserError(
            f"--dtype {dtype} is of models in torch, and {path} is a file", "leave it out"
        )


def _refuse_options_of_files(path: Path, types: KVTypes | None, mod: str | None) -> None:
    if not path.exists():
        raise UserError(
            f"no such model: {path}", "give a directory, a GGUF file or a name on the hub"
        )
    if mod:
        raise UserError(
            f"{path} is a directory, and routers of --mod go beside a GGUF file",
            f"run `mod-export convert {path} --adapter {mod}`",
        )
    if types:
        raise UserError(
            f"{path} is a directory, which has no types of K and V",
            "leave out --cache-type-k and --cache-type-v, or export it",
        )


def _open_directory(
    path: Path, weights: Path, base: str | Path | None, shift: float, device: str, dtype: str
) -> Reader:
    """Open an adapter, a MoD directory or a plain one in torch; weights: what has its weights."""
    place = devices.parse_device(device)
    chosen = devices.choose_dtype(dtype, loading.stored_type(weights), place)
    with stage(f"loading {path}"):
        if is_mod(path) or weights != path:
            model = adapter.open_model(path, base, chosen)
        else:
            model = MoDModel.from_base(*loading.load(path, chosen))
    model.shift = shift
    return TorchReader(model.to(place), path)


def _check_same_tokens(a: Reader, b: Reader) -> None:
    """Raise UserError unless both read a text as the same tokens."""
    if a.n_vocab != b.n_vocab or not same_tokens(a.tokenizer, b.tokenizer):
        raise UserError(
            f"{a.name} and {b.name} have different tokenizers",
            "give the dense model of the same family",
        )
