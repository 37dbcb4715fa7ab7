"""An adapter or a MoD directory -> a GGUF file: the base weights, then the routers.

    export(Path("adapter"), Path("mod.gguf"), base=Path("model-Q4_K_M.gguf"))  # onto a file
    export(Path("adapter"), Path("mod.gguf"), base=Path("model/"))  # by llama.cpp's converter
    export(Path("adapter"), Path("routers.gguf"))                   # to be put beside a file
    export(Path("mod"), Path("mod.gguf"), quant="q8_0")             # a directory has its weights
    export(Path("mod"), Path("mod.gguf"), base=Path("model-Q4_K_M.gguf"))
    export(Path("mod"), Path("dense.gguf"), dense=True)                     # the base alone
    export(Path("mod"), "out/")                                  # out/Qwen3-0.6B-MoD-kv-Q8_0.gguf

The routers stay f32. The file with routers is written in one pass over the mapped base, so that
memory use does not depend on the model's size. Temporary files lie beside the output.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mod_export.common import extras
from mod_export.common.files import atomic_file, check_file, check_room, folder_beside
from mod_export.common.messages import called
from mod_export.common.progress import stage
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import (
    adapter_files,
    architectures,
    base_identity,
    drafts,
    ggml_types,
    gguf_adapter,
    hf_directory,
    hub,
    kv_size,
    metadata,
    model_checks,
    schema,
)
from mod_export.formats.ggml_types import EXPORT_FORMATS, FLOAT_NAMES
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.schema import Routers
from mod_export.formats.sliding_windows import draft_layers, main_layers
from mod_export.llamacpp import converter
from mod_export.model import gguf_account

if TYPE_CHECKING:
    import gguf

logger = logging.getLogger(__name__)

DEFAULT_QUANT = "q8_0"
MIXED_SHARE = 1.25  # of the bytes of a quantisation, whose larger types some matrices get


def export(
    directory: Path,
    output: str | Path,
    quant: str | None = None,
    base: Path | None = None,
    dense: bool = False,
    force: bool = False,
) -> Path:
    """Write `output`, a GGUF of the MoD model in `directory`, and return its path.

    output: a text that ends with / is a folder, in which the file gets its name by the convention
        of GGUF files
    directory: a MoD model, or an adapter (also the name of a packaged one), of which the routers
        alone are written where there is no `base`
    quant: one of EXPORT_FORMATS; by default q8_0, and that of `base` where its weights stay
    base: the same model, whose weights are taken instead of those in `directory`: a GGUF file, or
        for an adapter a directory of transformers too, and whatever LoRA is merged into
    dense: leave the routers out

    Raises UserError for an output that exists (unless `force`), for a directory that is no MoD
    model or breaks the schema, for a base that does not fit, for an architecture or a layer that
    cannot have its units, and where the converter or the quantiser fails.
    """
    if quant is not None and quant not in EXPORT_FORMATS:
        raise UserError(f"unknown quantisation {quant!r}", f"known: {', '.join(EXPORT_FORMATS)}")
    directory = hub.locate(directory)
    base = None if base is None else hub.locate(base, gguf=None)
    adapter = adapter_files.find(directory)
    if adapter is None:
        config, routers = read_directory(directory)
    elif base is None:
        return _export_routers(adapter, output, quant, dense, force)
    elif _needs_weights(adapter, base):
        return _export_whole(adapter, base, output, quant, dense, force)
    else:
        config, routers = read_adapter(adapter, base)
    if config.top_k:
        raise UserError(
            f"{directory} chooses by top-k, which looks at later tokens",
            "use --method threshold to train",
        )
    weights = None if base is None else GGUFFile.open(base)
    if weights is None:
        quant = quant or DEFAULT_QUANT
        if not dense:
            _check_architecture(directory, config.units)
    else:
        schema.check_base(weights, config, routers)
        if not dense:
            architectures.check_units(weights, config)
        if adapter is None:
            gguf_account.check_base(directory, weights)
    about = metadata.describe(adapter or directory, None if dense else config, weights)
    if quant is not None and quant not in FLOAT_NAMES:
        about.quantized_by = metadata.QUANTIZED_BY
    if str(output).endswith(os.sep):
        encoding = quant or metadata.encoding(weights)
        output = Path(output, metadata.file_name(about, encoding))
    check_file(output, force)
    check_room(output, _room(directory, weights, quant), f"the export to {output}")
    with atomic_file(output, force) as target, folder_beside(output) as folder:
        plain = _base_weights(directory, base, quant, folder, about)
        with stage(f"writing {output}"):
            if not dense:
                source = GGUFFile.open(plain)
                if weights is None:
                    architectures.check_units(source, config, str(directory))
                write_routers(source, target, config, routers, about, consume=plain != base)
                if note := kv_size.window_note(source, config):
                    logger.warning(note)
            elif plain == base:
                _copy(plain, target)
            elif weights is not None:
                _copy(plain, target, about, consume=True)
            else:
                plain.replace(target)
    return Path(output)


def _export_routers(
    adapter: Path, output: str | Path, quant: str | None, dense: bool, force: bool
) -> Path:
    """Write the routers of an adapter to a file of their own, which the runtime takes as `mod`."""
    if quant is not None or dense:
        raise UserError(
            f"{adapter} is an adapter, without weights for {'--dense' if dense else '--quant'}",
            "give a GGUF of the model as --base",
        )
    found = adapter_files.read(adapter)
    if str(output).endswith(os.sep):
        about = metadata.describe(adapter, found.config)
        output = Path(output, metadata.file_name(about, None, "-routers.gguf"))
    with atomic_file(output, force) as target:
        gguf_adapter.write(target, found, adapter)
    return Path(output)


def _room(directory: Path, weights: GGUFFile | None, quant: str | None) -> float:
    """Return how many bytes of disk an export takes at most at a time, about.

    A file that the next one is made of gives its room back meanwhile.
    """
    if weights is not None and quant is None:
        return sum(tensor.nbytes for tensor in weights.tensors.values())
    if weights is None:
        shapes = hf_directory.shapes(directory)
        written = quant if quant in FLOAT_NAMES else hf_directory.stored_type(directory)
    else:
        shapes, written = [tensor.shape for tensor in weights.tensors.values()], quant
    n_bytes = ggml_types.bytes_per_value(EXPORT_FORMATS[written].type)
    mixed = MIXED_SHARE if written not in FLOAT_NAMES else 1.0
    return mixed * n_bytes * sum(map(math.prod, shapes))


def _needs_weights(adapter: Path, base: Path) -> bool:
    """Whether it takes more than the routers of an adapter and a GGUF file to make another one."""
    return base.is_dir() or adapter_files.read(adapter).lora


def _export_whole(
    adapter: Path, base: Path, output: str | Path, quant: str | None, dense: bool, force: bool
) -> Path:
    """Export an adapter by way of a MoD directory, whose weights are links where they stay."""
    from mod_export.convert import convert_adapter

    check_file(Path(output, "model.gguf") if str(output).endswith(os.sep) else output, force)
    with folder_beside(output) as folder:
        directory = folder / "mod"
        name = f"{hub.repository(base) or base.name} with {adapter.name}"
        with called(directory, name):
            convert_adapter(str(base), directory, adapter, linked=True)
            return export(directory, output, quant, dense=dense, force=force)


def check_model(base, tokenizer, kinds: Collection[str], folder: Path) -> None:
    """Raise UserError where no GGUF file can be made of a model in torch, before work goes into it.

    kinds: of the units that the model shall have; folder: to write to, the model without weights.
    llama.cpp's converter has to know the architecture and the tokenizer, the architecture has to
    run the units, and llama.cpp has to cut texts as the tokenizer does.
    """
    from mod_export.model import directory as model_directory

    with stage("comparing the tokenizer"):
        model_directory.save_without_weights(folder, base, tokenizer)
        _check_architecture(folder, kinds)
        file = folder / "vocabulary.gguf"
        _convert(folder, file, "f32", vocabulary_only=True)
        _check_tokenizer(folder, file)


def _convert(directory: Path, target: Path, outtype: str, **options) -> None:
    """Run llama.cpp's converter, which takes the vocabulary of a GGUF file where there is one."""
    vocabulary = directory / hf_directory.VOCABULARY
    converter.convert_hf(
        directory,
        target,
        outtype,
        skip=schema.HF_ROUTER_TENSOR,
        vocabulary=vocabulary if vocabulary.is_file() else None,
        **options,
    )


def _check_architecture(directory: Path, kinds: Collection[str]) -> None:
    """Raise UserError where the model's architecture in llama.cpp lacks one of the kinds of units.

    Nothing is checked where only the converter knows the architecture.
    """
    found = hf_directory.read_json(directory / hf_directory.CONFIG_JSON, hf_directory.CONVERT)
    classes = found.get("architectures") or [""]
    if architecture := architectures.of_class(classes[0]):
        architectures.check(architecture, kinds)


def write_routers(
    source: GGUFFile,
    target: Path,
    config: MoDConfig,
    routers: Routers,
    about: gguf.Metadata | None = None,
    consume: bool = False,
) -> None:
    """Copy the dense GGUF `source` to `target` and add the keys and tensors of the schema.

    about: what the keys general.* shall say. consume: as formats.gguf.rewrite takes it.
    """
    added, dropped = metadata.keys(about, source) if about else ((), ())
    with open(target, "wb") as file:
        schema.write_routers(source, file, config, routers, added, dropped, consume)


def _copy(
    plain: Path, target: Path, about: gguf.Metadata | None = None, consume: bool = False
) -> None:
    source = GGUFFile.open(plain)
    added, dropped = metadata.keys(about, source) if about else ((), ())
    with open(target, "wb") as file:
        rewrite(source, file, added_keys=added, dropped_keys=dropped, consume=consume)


def _base_weights(
    directory: Path, base: Path | None, quant: str | None, folder: Path, about: gguf.Metadata
) -> Path:
    """The GGUF without routers, in the quantisation asked for; a new file lies in `folder`."""
    if base is not None:
        plain = base
    else:
        plain, keys = folder / "base.gguf", folder / "metadata.json"
        keys.write_text(json.dumps(metadata.override(about)), encoding="utf-8")
        with stage("converting the weights"):
            outtype = quant if quant in FLOAT_NAMES else hf_directory.stored_type(directory)
            _convert(directory, plain, outtype, metadata=keys)
        with stage("comparing the tokenizer"):
            _check_tokenizer(directory, plain)
        plain = _with_drafts(directory, _with_additions(directory, plain))
        with stage("opening the file"):
            _check_opens(directory, plain)
        if quant in FLOAT_NAMES:
            return plain
    if quant is None:
        return plain
    quantised = folder / "quantised.gguf"
    with stage(f"quantising to {quant}"):
        converter.quantize(plain, quantised, quant, consume=base is None)
    return quantised


def _with_additions(directory: Path, plain: Path) -> Path:
    """The GGUF with what llama.cpp's converter left out of it, in a new file if there is any."""
    source = GGUFFile.open(plain)
    added = gguf_account.account(directory, source)
    if not added:
        return plain
    complete = plain.with_name("complete.gguf")
    added.write(source, complete, consume=True)
    plain.unlink()
    return complete


def _with_drafts(directory: Path, plain: Path) -> Path:
    """The GGUF with the layers for drafts that the directory has from a GGUF file, in a new file.

    The log says so where llama.cpp's converter left out those that the directory's weights have.
    """
    source, kept = GGUFFile.open(plain), directory / hf_directory.DRAFTS
    if kept.is_file():
        drafted = plain.with_name("drafted.gguf")
        drafts.append(source, GGUFFile.open(kept), drafted)
        plain.unlink()
        return drafted
    index = hf_directory.tensor_index(hf_directory.tensor_files(directory))
    n_main = main_layers(source)
    if not draft_layers(source) and any(drafts.is_draft(name, n_main) for name in index):
        logger.warning(
            f"note: the file drafts no tokens for itself: llama.cpp's converter leaves out the "
            f"layers for drafts of {directory}"
        )
    return plain


def _check_opens(directory: Path, plain: Path) -> None:
    """Raise UserError where llama.cpp, if it is installed, refuses what its converter made."""
    if not extras.is_installed("llama_cpp"):
        return
    from mod_export.runtime.opening import check_opens

    cure = "use it in torch: llama.cpp lacks a part of this model"
    check_opens(plain, cure, name=f"what its converter made of {directory}")


def _check_tokenizer(directory: Path, plain: Path) -> None:
    """Raise UserError where llama.cpp cuts a text otherwise than the directory's own tokenizer.

    Nothing is compared where the directory has no tokenizer of transformers, or no llama_cpp is
    installed.
    """
    if not (directory / "tokenizer.json").is_file() or not extras.is_installed("llama_cpp"):
        return
    from mod_export.model import loading
    from mod_export.runtime import vocabulary

    if (directory / hf_directory.VOCABULARY).is_file():
        cure = (
            f"remove {hf_directory.VOCABULARY} from {directory} if its tokenizer was changed, or "
        )
    else:
        cure = ""
    cure += converter.ONTO_BASE
    if GGUFFile.open(plain).get("tokenizer.ggml.model") == "llama":
        tokenizer = loading.sentence_piece_tokenizer(directory)
    else:
        tokenizer = loading.load_tokenizer(directory)
    vocabulary.check_tokenizer(plain, tokenizer, cure, str(directory))
    for token in vocabulary.unknown_ends(plain, _ends(directory)):
        logger.warning(
            f"note: generation_config.json ends an answer at {tokenizer.decode([token])!r}, the "
            "GGUF file does not: it has one such token, and those that llama.cpp knows by name"
        )


def _ends(directory: Path) -> list[int]:
    """The tokens that end an answer, as transformers generates."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    found = hf_directory.read_json(path, hf_directory.CONVERT_AGAIN).get("eos_token_id")
    tokens = found if isinstance(found, list) else [found]
    return [token for token in tokens if isinstance(token, int)]


def read_directory(directory: Path) -> tuple[MoDConfig, Routers]:
    """Configuration and routers of a MoD directory, all checked, at least one unit routed."""
    config = hf_directory.read_config(directory)
    if not config.routed():
        raise UserError(f"{directory} routes no unit", hf_directory.CONVERT_AGAIN)
    return config, hf_directory.read_routers(hf_directory.tensor_files(directory), config)


def read_adapter(directory: Path, base: Path) -> tuple[MoDConfig, Routers]:
    """Configuration and routers of an adapter.

    The adapter must fit the GGUF `base`, whose quantisation does not matter.
    """
    found = adapter_files.read(directory)
    file = GGUFFile.open(base)
    model_checks.check_model(file)
    base_identity.compare(found.base, base_identity.gguf_identity(file))
    return found.config, found.routers
