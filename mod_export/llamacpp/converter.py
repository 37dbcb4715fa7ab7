"""llama.cpp's own converter and quantiser.

Each runs in a process of its own, so that a crash there is an error here.

    convert_hf(Path("dir"), Path("base.gguf"), "f32", skip=routers)
    quantize(Path("base.gguf"), Path("small.gguf"), "q4_k_m")
"""

import contextlib
import logging
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from mod_export.common.files import give_back
from mod_export.common.system import usable_cpus
from mod_export.common.text import last_words
from mod_export.errors import UserError
from mod_export.formats import drafts
from mod_export.formats.ggml_types import EXPORT_FORMATS, F32_TYPE, block_size, enum_name
from mod_export.formats.gguf import GGUFFile
from mod_export.llamacpp import source as llama_source

logger = logging.getLogger(__name__)

# What a tool warns of is passed on to the user, except for these lines.
WARNINGS = re.compile(r"(?:WARNING:[\w.-]+: ?|\w+: WARNING: |.*\b\w*Warning: )(.+)")
LEVEL = re.compile(r"(?:ERROR|WARNING):[\w.-]+: ?")
KNOWN_WARNINGS = re.compile(
    # no scaling, and factors that the converter writes as a tensor
    "Unknown RoPE type: (default|proportional)"
    # a class of the converter writes a key anew after its parent
    "|Duplicated key name|Ignoring head_dim .* for Granite"
    "|.*is not in MXFP4"  # `--quant` says which type the experts of gpt-oss get
    "|.*required fallback quantization"  # `describe_types` says which tensors
    "|.*is deprecated|.*will be removed"  # for those who write the tools
)

# Scripts that run in the converter's process, in the source directory of llama.cpp. This one puts
# right what the converter does not find in directories that transformers 5 has written.
FIELDS_SCRIPT = """
import re
from conversion import ModelBase

# fields of GPT-NeoX and Cohere 2, of AFMoE, the types of layers of Granite 4 H and Nemotron-H, and
# the class of MPT
FORMER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}

def with_former_fields(hparams):
    rope = hparams.get("rope_parameters") or {}
    hparams.setdefault("rotary_pct", rope.get("partial_rotary_factor", 1.0))
    hparams.setdefault("route_norm", True)
    if hparams.get("architectures") == ["MptForCausalLM"]:
        hparams["architectures"] = ["MPTForCausalLM"]
    if hparams.get("model_type") == "granitemoehybrid":
        kinds = hparams["layer_types"]
        hparams["layer_types"] = [FORMER_TYPES.get(kind, kind) for kind in kinds]
    kinds = hparams.get("layers_block_type") or [None]
    if hparams.get("model_type") == "nemotron_h" and set(kinds) <= set(LETTERS):
        hparams["hybrid_override_pattern"] = "".join(LETTERS[kind] for kind in kinds)
        if "moe" not in kinds:  # the fields of experts have defaults
            for name in ("num_experts_per_tok", "n_routed_experts", "num_local_experts", "n_group"):
                hparams.pop(name, None)
    return hparams

load_hparams, init = ModelBase.load_hparams, ModelBase.__init__

def init_with_former_fields(self, *args, hparams=None, **kwargs):
    if hparams is not None:  # a class of models has read the file itself
        hparams = with_former_fields(hparams)
    init(self, *args, hparams=hparams, **kwargs)

def load_with_former_fields(*args, **kwargs):
    return with_former_fields(load_hparams(*args, **kwargs))

ModelBase.load_hparams = staticmethod(load_with_former_fields)
ModelBase.__init__ = init_with_former_fields

# The fields count layers that predict tokens further on, where the weights may have none.
index_all = ModelBase.index_tensors
DRAFT = re.compile(DRAFT_NAME)
LAYERS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")

def index_present_layers(self, *args, **kwargs):
    tensors = index_all(self, *args, **kwargs)
    fields = [self.hparams, self.hparams.get("text_config") or {}]
    n_layer = max(part.get(name) or 0 for part in fields for name in LAYERS)
    found = filter(None, map(DRAFT.match, tensors))
    if not any(match[1] is None or int(match[1]) >= n_layer for match in found):
        self.no_mtp = True
        for part in fields:
            for name in {"num_nextn_predict_layers", "mtp_num_hidden_layers"} & part.keys():
                part[name] = 0
    return tensors

ModelBase.index_tensors = index_present_layers
""".replace("DRAFT_NAME", repr(drafts.NAME.pattern))
# The routers are no part of the base model: export.py adds them afterwards.
CONVERTER_SCRIPT = """
import re, runpy, sys
sys.path.insert(0, ".")
exec(sys.argv.pop(1))
from conversion import ModelBase

index_tensors = ModelBase.index_tensors
skip = re.compile(sys.argv[1])

def index_without_routers(self, *args, **kwargs):
    tensors = index_tensors(self, *args, **kwargs)
    return {name: tensor for name, tensor in tensors.items() if not skip.fullmatch(name)}

ModelBase.index_tensors = index_without_routers

# a model that came from a GGUF file keeps the keys of its vocabulary, and of its sampling
vocabulary = sys.argv[2]
if vocabulary:
    from conversion.base import TextModel, gguf

    prepare_metadata = TextModel.prepare_metadata

    def prepare_with_vocabulary(self, *args, **kwargs):
        def set_vocab():
            for name, field in gguf.GGUFReader(vocabulary).fields.items():
                if name.startswith(("tokenizer.", "general.sampling.")):
                    item = field.types[-1] if len(field.types) > 1 else None
                    self.gguf_writer.add_key_value(name, field.contents(), field.types[0], item)

        self.set_vocab = set_vocab
        return prepare_metadata(self, *args, **kwargs)

    TextModel.prepare_metadata = prepare_with_vocabulary
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
NO_ROOM = re.compile("No space left|File too large|Disk quota|iostream|write failed")
UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
ONTO_BASE = "put the routers on a GGUF of the model with --base"
MAKE_ROOM = "make room on the disk, or choose another output"
QUANTIZER_SCRIPT = """
import re, sys, llama_cpp

# The name of each tensor comes on stdout when its turn comes, all else on stderr.
@llama_cpp.llama_log_callback
def log(level, text, _):
    text = text.decode(errors="replace")
    if found := re.match(r"\\[ *\\d+/ *\\d+\\] +(\\S+) ", text):
        print(found[1], flush=True)
    print(text, end="", file=sys.stderr, flush=True)

llama_cpp.llama_log_set(log, None)
source, target, ftype, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(ftype)
params.nthread = int(threads)
params.allow_requantize = True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def convert_hf(
    directory: Path,
    target: Path,
    outtype: str,
    skip: re.Pattern,
    metadata: Path | None = None,
    vocabulary: Path | None = None,
    vocabulary_only: bool = False,
) -> None:
    """Write the Hugging Face model of `directory` as a GGUF.

    outtype: type of the weights, one of FLOAT_NAMES
    skip: names of tensors that stay out
    metadata: a JSON file of keys general.* that come before what the converter finds itself
    vocabulary: a GGUF file whose tokenizer is taken, instead of the directory's
    vocabulary_only: leave out the weights, which the directory may lack, and all warnings

    Raises UserError with the converter's last words, for instance where llama.cpp does not know the
    architecture.
    """
    source = llama_source.source_dir() / llama_source.LLAMA_CPP
    arguments = [
        FIELDS_SCRIPT,
        skip.pattern,
        str(vocabulary.resolve()) if vocabulary else "",
        str(directory.resolve()),
        "--outfile",
        str(target.resolve()),
        "--outtype",
        outtype,
    ]
    if metadata:
        arguments += ["--metadata", str(metadata.resolve())]
    if vocabulary_only:
        arguments.append("--vocab-only")
    result = _python(CONVERTER_SCRIPT, arguments, cwd=source)
    if result.returncode != 0:
        words = _reason(result)
        cure = MAKE_ROOM if NO_ROOM.search(words) else ONTO_BASE
        if UNKNOWN_TOKENIZER in words:
            raise UserError(f"llama.cpp does not know the tokenizer of {directory}", cure)
        raise UserError(f"llama.cpp's converter cannot convert {directory}: {words}", cure)
    if not vocabulary_only:
        _pass_on_warnings(result, "llama.cpp's converter")


def quantize(source: Path, target: Path, quant: str, consume: bool = False) -> None:
    """Write a GGUF in one of EXPORT_FORMATS, and log which types came out otherwise.

    consume: the room of `source` on the disk is given back meanwhile, and the file is removed.
    Matrices that are quantised already are rounded a second time. Raises UserError with the
    library's last words.
    """
    arguments = [str(source.resolve()), str(target.resolve())]
    arguments += [str(EXPORT_FORMATS[quant].file_type), str(usable_cpus())]
    result = _quantizer(arguments, source if consume else None)
    if consume:
        source.unlink()
    if "No module named 'llama_cpp'" in result.stderr:
        raise UserError("the runtime llama_cpp is not installed", "run `mod-export build`")
    if result.returncode != 0:
        words = _reason(result)
        cure = MAKE_ROOM if NO_ROOM.search(words) else "use --quant q8_0 or f16"
        raise UserError(f"cannot quantise {source.name} to {quant}: {words}", cure)
    _pass_on_warnings(result, "llama.cpp's quantiser")
    if line := describe_types(GGUFFile.open(target), quant):
        logger.warning(line)


def describe_types(file: GGUFFile, quant: str) -> str:
    """A line that counts the types of a quantised file's matrices; '' where all could have theirs.

    quant: the one of EXPORT_FORMATS that was asked for. A type quantises blocks of a row, and
    llama.cpp gives a matrix whose rows are not whole blocks another, larger type. Those in F32 do
    not count, such as convolutions of recurrent layers: it quantises them in no file.
    """
    block = block_size(EXPORT_FORMATS[quant].type)
    every = file.tensors.values()
    matrices = [tensor for tensor in every if len(tensor.shape) > 1 and tensor.type != F32_TYPE]
    odd = [tensor for tensor in matrices if tensor.shape[0] % block]
    if not odd:
        return ""
    types = Counter(enum_name(tensor.type) for tensor in matrices)
    lengths = " or ".join(str(length) for length in sorted({tensor.shape[0] for tensor in odd}))
    return (
        f"{quant}: {len(odd)} of {len(matrices)} matrices have rows of {lengths} values, no "
        f"multiple of {block}, and got larger types; in the file: "
        + ", ".join(f"{count} {name}" for name, count in types.most_common())
    )


def _python(
    code: str, arguments: list[str], cwd: Path | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")


def _quantizer(arguments: list[str], consumed: Path | None) -> subprocess.CompletedProcess:
    """Run the quantiser, and give back the room of each tensor of a file when it is done."""
    command = [sys.executable, "-c", QUANTIZER_SCRIPT, *arguments]
    tensors = GGUFFile.open(consumed).tensors if consumed else {}
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        file = stack.enter_context(consumed.open("r+b")) if consumed else None
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        stack.enter_context(process)
        before = None
        for line in process.stdout or ():
            if file and before:
                give_back(file, before.start, before.nbytes)
            before = tensors.get(line.strip())
        code = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, "", errors.read())


def _pass_on_warnings(result: subprocess.CompletedProcess, who: str) -> None:
    """Log what a tool that succeeded has warned of, each line once."""
    found = (WARNINGS.match(line.strip()) for line in (result.stderr + result.stdout).splitlines())
    for text in dict.fromkeys(match[1] for match in found if match):
        if not KNOWN_WARNINGS.match(text):
            logger.warning(f"{who}: {text}")


def _reason(result: subprocess.CompletedProcess) -> str:
    words = LEVEL.sub("", last_words(result.stderr + result.stdout), count=1)
    return words or f"it ended with code {result.returncode}"
