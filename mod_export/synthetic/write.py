"""A MoD GGUF file of any shape with random weights, to measure the speed of that shape.

    shape = replace(preset_named("8b"), layers=16)
    config = routing_of(header(shape), SynthesisOptions(units="attn+kv"))
    synth("syn.gguf", shape, "q4_0", config, dense="dense.gguf")

What such a model writes means nothing. How long it takes is real, and so is the share of the tokens
that runs each unit. The file has no tokenizer. Needs ggml's quantiser, from any build of llama_cpp.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, GGUFWriter

from mod_export.common.files import atomic_file, check_room
from mod_export.common.progress import stage
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import schema
from mod_export.formats.ggml_types import file_type, type_named
from mod_export.formats.gguf import fill, pad
from mod_export.synthetic import tensors
from mod_export.synthetic.keys import keys
from mod_export.synthetic.routers import routers
from mod_export.synthetic.shape import Shape
from mod_export.synthetic.tensors import Weight
from mod_export.synthetic.weights import Weights

logger = logging.getLogger(__name__)

ALIGNMENT = 32
KEY_TYPES = {
    "u32": (GGUFValueType.UINT32, None),
    "f32": (GGUFValueType.FLOAT32, None),
    "string": (GGUFValueType.STRING, None),
    "bool": (GGUFValueType.BOOL, None),
    "f32[]": (GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
    "u32[]": (GGUFValueType.ARRAY, GGUFValueType.UINT32),
    "i32[]": (GGUFValueType.ARRAY, GGUFValueType.INT32),
}


def synth(
    output: str | os.PathLike,
    shape: Shape,
    quant: str,
    config: MoDConfig,
    dense: str | os.PathLike | None = None,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write `output`, and to `dense` the same model without routers; each whole or not at all.

    quant: a type in ggml_types.TYPE_NAMES. The weights depend on shape, quant and seed only. Raises
    UserError for an impossible shape, an output that exists (unless `force`), and too little disk
    space.
    """
    type = type_named(quant)
    tensors.check_type(shape.checked(), type)
    outputs = [output] if dense is None else [output, dense]
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UserError(f"{output} is both outputs", "name the dense file differently")
    config.validate(shape.layers)
    with ExitStack() as stack:
        targets = [stack.enter_context(atomic_file(path, force)) for path in outputs]
        plan = list(tensors.weights(shape, type))
        _check_room(targets, sum(pad(weight.nbytes, ALIGNMENT) for weight in plan))
        logger.info("drawing tokens and routers")
        with stage("drawing"):
            weights = Weights(shape, type, seed)
            added = _router_tensors(config, weights)
        for target in targets:
            is_mod = target is targets[0]
            _write_header(
                target, shape, type, plan, config if is_mod else None, added if is_mod else {}
            )
        files = [stack.enter_context(target.open("ab")) for target in targets]
        _write_weights(files, plan, weights)
        for array in added.values():
            _append(files[:1], [array.view(np.uint8)])


def _check_room(targets: list[Path], n_bytes: int) -> None:
    """Raise UserError where the file systems of the outputs have not `n_bytes` bytes for each."""
    by_device: dict[int, list[Path]] = {}
    for target in targets:
        by_device.setdefault(target.stat().st_dev, []).append(target)
    for here in by_device.values():
        check_room(here[0], n_bytes * len(here), "the model", "free some, or take a smaller model")


def _router_tensors(config: MoDConfig, weights: Weights) -> dict[str, np.ndarray]:
    """Tensor name -> float32 values, of all routers."""
    return schema.to_tensors(config, routers(config, weights))


def _write_header(
    path: Path,
    shape: Shape,
    type: Type,
    plan: list[Weight],
    config: MoDConfig | None,
    added: dict[str, np.ndarray],
) -> None:
    """Write keys and tensor infos, padded to where the data begins.

    With a config the header holds the routers' keys and tensors too.
    """
    writer = GGUFWriter(path, shape.arch)
    size = sum(weight.all_rows * weight.cols for weight in plan)
    writer.add_name(f"synthetic {shape.arch}, {size / 1e9:.2f}B random weights")
    writer.add_file_type(file_type(type))
    writer.add_tokenizer_model("no_vocab")
    added_keys = schema.to_keys(shape.arch, config) if config else []
    for key, type_name, value in [*keys(shape), *added_keys]:
        plain = list(value) if type_name.endswith("[]") else value
        writer.add_key_value(key, plain, *KEY_TYPES[type_name])
    for weight in plan:
        writer.add_tensor_info(
            weight.name, weight.dims, np.dtype(np.float32), weight.nbytes, weight.type
        )
    for name, array in added.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        fill(file, pad(file.tell(), ALIGNMENT))


def _write_weights(files: list[BinaryIO], plan: list[Weight], weights: Weights) -> None:
    """All weights, to all files at once, with a line for every tenth."""
    total, done, told = sum(weight.nbytes for weight in plan), 0, 0
    for weight in plan:
        _append(files, weights.content(weight))
        done += weight.nbytes
        if done * 10 // total > told:
            told = done * 10 // total
            logger.info(f"wrote {done / 1e6:.0f} of {total / 1e6:.0f} MB")


def _append(files: list[BinaryIO], pieces: Iterable[np.ndarray]) -> None:
    """A tensor's bytes to each of the files, padded."""
    for piece in pieces:
        for file in files:
            file.write(np.ascontiguousarray(piece).data)
    for file in files:
        fill(file, pad(file.tell(), ALIGNMENT))
