"""llama.cpp's own converter and quantiser, each in a process of its own: a crash there is an error
here.

convert_hf(Path("dir"), Path("base.gguf"), "f32")   # a Hugging Face directory, routers left out
quantize(Path("base.gguf"), Path("small.gguf"), "q4_k_m")
"""

import re
import subprocess
import sys
from pathlib import Path

from mod_export.common.system import usable_cpus
from mod_export.errors import UserError
from mod_export.formats.ggml_types import EXPORT_FORMATS
from mod_export.llamacpp import source as llama_source

# runs inside the converter's process, in the source directory of llama.cpp
CONVERTER = """
import re, runpy, sys
sys.path.insert(0, ".")
from conversion import ModelBase
index, skip = ModelBase.index_tensors, re.compile(sys.argv[1])
# the routers are no part of the base model: export.py adds them afterwards
ModelBase.index_tensors = lambda self, *args, **kwargs: {
    name: tensor for name, tensor in index(self, *args, **kwargs).items() if not skip.fullmatch(name)}
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
QUANTIZER = """
import sys, llama_cpp
source, target, ftype, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(ftype), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def convert_hf(
    directory: Path, target: Path, outtype: str, skip: re.Pattern, name: str | None = None
) -> None:
    """Write the model of `directory` as a GGUF with weights of type f32, f16 or bf16; tensors named
    `skip` stay out.

    name: general.name of the file; by default the converter makes one from the directory's. Raises
    UserError with the converter's last words, for instance where llama.cpp does not know the
    architecture.
    """
    source = llama_source.source_dir() / "vendor/llama.cpp"
    arguments = [
        skip.pattern,
        str(directory.resolve()),
        "--outfile",
        str(target.resolve()),
        "--outtype",
        outtype,
    ]
    arguments += ["--model-name", name] if name else []
    result = _python(CONVERTER, arguments, cwd=source)
    if result.returncode != 0:
        raise UserError(f"llama.cpp's converter cannot convert {directory}: {_last_words(result)}")


def quantize(source: Path, target: Path, quant: str) -> None:
    """Quantise a GGUF of floats to one of EXPORT_FORMATS. Raises UserError with the library's last words."""
    result = _python(
        QUANTIZER,
        [
            str(source.resolve()),
            str(target.resolve()),
            str(EXPORT_FORMATS[quant].file_type),
            str(usable_cpus()),
        ],
    )
    if "No module named 'llama_cpp'" in result.stderr:
        raise UserError("the runtime llama_cpp is not installed", "run `mod-export build`")
    if result.returncode != 0:
        raise UserError(f"cannot quantise {source.name} to {quant}: {_last_words(result)}")


def _python(
    code: str, arguments: list[str], cwd: Path | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")


def _last_words(result: subprocess.CompletedProcess) -> str:
    """The last line that looks like an error, else the last line, else how the process ended."""
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\w+Error|ERROR|error|\w+: (error|failed))\b", line)
    ]
    return (errors or lines or [f"it ended with code {result.returncode}"])[-1]
