"""Layers for drafts: they predict tokens further on, behind a model's own (multi-token prediction).

transformers has no place for them in its models. So they go as they are from the files that a model
was read from into the directory that is written: tensors of safetensors files under the names that
they have there, those of a GGUF file into a GGUF file of their own, which `export` puts behind the
layers that llama.cpp's converter writes.

    carry(Path("Qwen3.5-4B"), Path("mod"), n_layer=32)     # from a directory or a GGUF file
    append(GGUFFile.open("plain.gguf"), GGUFFile.open("mod/drafts.gguf"), Path("whole.gguf"))
"""

from __future__ import annotations

import logging
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import base_identity, hf_directory, safetensors_writing
from mod_export.formats.gguf import GET_AGAIN, GGUFFile, rewrite
from mod_export.formats.hf_directory import DRAFTS
from mod_export.formats.safetensors_writing import StoredTensor, piece_of
from mod_export.formats.sliding_windows import draft_layers, layer_arrays, main_layers

logger = logging.getLogger(__name__)

# Of a checkpoint: names of their own, or those of a layer behind the last one
NAME = re.compile(r"(?:model\.|language_model\.)*(?:mtp[._]|layers\.(\d+)\.)")
OF_TEXT = "language_model."  # in names of models that also take images; a text model has none
FLOATS = ("F64", "F32", "F16", "BF16")
# What may be a copy -> the model's matrix. Without an output matrix it is the embedding.
EMBEDDING = "model.embed_tokens.weight"
COPIES = {".embed_tokens.weight": EMBEDDING, ".shared_head.head.weight": "lm_head.weight"}
GGUF_COPIES = {
    ".nextn.embed_tokens.weight": "token_embd.weight",
    ".nextn.shared_head_head.weight": "output.weight",
}
SAME_DISTANCE = 0.5  # between two quantisations of one matrix there is less


def is_draft(name: str, n_layer: int) -> bool:
    """Whether a tensor of a checkpoint, whose model has so many layers, is one of its drafts."""
    found = NAME.match(name)
    return found is not None and (found[1] is None or int(found[1]) >= n_layer)


def carry(source: Path, target: Path, n_layer: int) -> None:
    """Bring the layers for drafts of a model's files into a directory that lacks them.

    source: what the model was read from, a directory or a GGUF file. n_layer: the model's own.
    Matrices that the drafts share with the model are those that the directory has. Quantised
    tensors of a directory stay behind, and the log says so.
    """
    if source.is_file():
        file = GGUFFile.open(source)
        if draft_layers(file):
            _write(file, target / DRAFTS)
    elif (source / DRAFTS).is_file():
        shutil.copyfile(source / DRAFTS, target / DRAFTS)
    elif any(source.glob("*.safetensors")):
        _carry_tensors(source, target, n_layer)


def _carry_tensors(source: Path, target: Path, n_layer: int) -> None:
    there = hf_directory.tensor_index(hf_directory.tensor_files(target))
    stored = _stored(hf_directory.tensor_files(source))
    theirs = {name.replace(OF_TEXT, ""): one for name, one in stored.items()}
    found = {name: one for name, one in theirs.items() if is_draft(name, n_layer)}
    if odd := sorted({one.dtype for one in found.values()} - {*FLOATS}):
        logger.warning(
            f"note: the layers for drafts of {source} do not come along, because they have weights "
            f"of the type {odd[0]}: give the model in bf16, or put an adapter on a GGUF file"
        )
        return
    added = []
    for name, one in found.items():
        if name not in there:
            shared = _shared(name, one, theirs)
            mine = _stored([there[shared]])[shared] if shared in there else one
            added.append(StoredTensor(name, mine.dtype, mine.shape, mine.values))
    if added:
        safetensors_writing.add(added, target)


def _stored(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of files by their names, as what can be written again."""
    found = {}
    for path in files:
        start = hf_directory.data_start(path)
        for name, about in hf_directory.safetensors_header(path).items():
            begin, end = about["data_offsets"]
            values = partial(piece_of, path, start + begin, end - begin)
            found[name] = StoredTensor(name, about["dtype"], tuple(about["shape"]), values)
    return found


def _shared(name: str, one: StoredTensor, theirs: dict[str, StoredTensor]) -> str:
    """The model's matrix that a tensor of the drafts is a copy of; '' where it is its own."""
    for end, matrix in COPIES.items():
        matrix = matrix if matrix in theirs else EMBEDDING
        if name.endswith(end) and matrix in theirs and _same(one, theirs[matrix]):
            return matrix
    return ""


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and values."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(one.values(), other.values(), strict=True))


def _write(source: GGUFFile, path: Path) -> None:
    """Write the layers for drafts of a GGUF file, and the keys of its architecture, to another."""
    n_layer, kept = main_layers(source), ("general.architecture", f"{source.architecture}.")
    names = [name for name in source.tensors if layer_of(name) >= n_layer]
    names = [name for name in names if not _is_copy(source, name)]
    with path.open("wb") as file:
        rewrite(
            source,
            file,
            dropped_keys=[key for key in source.keys if not key.startswith(kept)],
            kept_tensors={name: name for name in names},
        )


def _is_copy(file: GGUFFile, name: str) -> bool:
    """Whether a matrix is the model's, which llama.cpp takes where the drafts have none."""
    for end, matrix in GGUF_COPIES.items():
        other = file.tensors.get(matrix) or file.tensors.get("token_embd.weight")
        if name.endswith(end) and other and file.tensors[name].shape == other.shape:
            samples = [base_identity.sample(tensor) for tensor in (file.tensors[name], other)]
            return all(samples) and base_identity.distance(*samples) < SAME_DISTANCE
    return False


def append(file: GGUFFile, drafts: GGUFFile, target: Path) -> None:
    """Write a GGUF file with the layers of another one behind its own; `file` gives its room back.

    Raises UserError where they are not of one model.
    """
    arch, n_layer = file.architecture, main_layers(file)
    if (drafts.architecture, main_layers(drafts)) != (arch, n_layer):
        raise UserError(
            f"{drafts.path} has layers for drafts of a {drafts.architecture} of "
            f"{main_layers(drafts)} layers, the model is a {arch} of {n_layer}",
            f"remove {drafts.path}",
        )
    n_draft = draft_layers(drafts)
    nextn, count = f"{arch}.nextn_predict_layers", f"{arch}.block_count"
    changed: dict[str, object] = {count: n_layer + n_draft}
    for name in layer_arrays(file, n_layer):
        theirs = np.ravel(drafts.get(name, 0))
        tail = theirs[n_layer:] if len(theirs) > 1 else np.repeat(theirs, n_draft)
        if len(tail) != n_draft:
            raise UserError(f"{drafts.path}: key {name} has {len(theirs)} values", GET_AGAIN)
        changed[name] = [*file.keys[name].value, *tail]
    with target.open("wb") as out:
        rewrite(
            file,
            out,
            added_keys=[(nextn, "u32", n_draft)],
            changed_keys=changed,
            dropped_keys=[nextn],
            added_tensors=drafts.tensors,
            consume=True,
        )


def layer_of(tensor: str) -> int:
    """The number of the layer that a tensor of a GGUF file is of; -1 for none."""
    found = re.match(r"blk\.(\d+)\.", tensor)
    return int(found[1]) if found else -1
