"""Write what scripts/gpu/pack.sh sends for check.sh.

    python scripts/gpu/pack.py BUILD MODEL

BUILD/cache/source gets the sources of both libraries: what cmake reads for libllama, for ggml's CPU
and CUDA backends and for test-backend-ops. The sources are patched, so that the GPU machine needs
no git and no archive. MODEL/adapters gets random routers for SmolLM2, whose biases fit text.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from mod_export.cli.output import show_messages
from mod_export.errors import UserError
from mod_export.formats import adapter_files, hub, schema
from mod_export.llamacpp import source as llama_source

UNITS = ("block", "attn", "attn+ffn+kv")  # beside the packaged adapter, which has kv
PARTS = ("CMakeLists.txt", "LICENSE", "cmake", "include", "src", "vendor", "ggml")
TESTS = ("test-backend-ops.cpp", "test-backend-ops-mod.h")
BACKENDS = ("ggml-cpu", "ggml-cuda")


def main() -> None:
    build, model = map(Path, sys.argv[1:])
    for stock in (False, True):
        source = llama_source.source_dir(stock)
        copy_source(source, build / "cache/source" / source.name)
    show_messages(stdout=True)
    for units in UNITS:
        print(f"routers for {units}", flush=True)
        write_adapter(units, model / "adapters" / units)


def copy_source(source: Path, target: Path) -> None:
    """Copy the Python package llama_cpp, and of llama.cpp the sources that are compiled."""
    root, to = source / "vendor/llama.cpp", target / "vendor/llama.cpp"
    shutil.copytree(
        source / "llama_cpp",
        target / "llama_cpp",
        ignore=shutil.ignore_patterns("__pycache__", "server"),
    )
    for part in PARTS:
        (to / part).parent.mkdir(parents=True, exist_ok=True)
        if (root / part).is_dir():
            shutil.copytree(root / part, to / part, ignore=other_backends)
        else:
            shutil.copy2(root / part, to / part)
    (to / "tests").mkdir()
    for name in filter(lambda name: (root / "tests" / name).is_file(), TESTS):
        shutil.copy2(root / "tests" / name, to / "tests")


def other_backends(folder: str, names: list[str]) -> list[str]:
    inside = Path(folder).parts[-2:] == ("ggml", "src")
    return [
        name for name in names if inside and Path(folder, name).is_dir() and name not in BACKENDS
    ]


def write_adapter(units: str, folder: Path) -> None:
    """Write routers for the embedded model, with about half of the tokens active.

    Four rounds of fitting are enough here.
    """
    from safetensors.numpy import save_file

    from mod_export.formats.base_identity import gguf_identity
    from mod_export.formats.gguf import GGUFFile
    from mod_export.synthetic.onto_base import onto
    from mod_export.synthetic.routers import SynthesisOptions

    base = hub.embedded_gguf()
    with tempfile.TemporaryDirectory() as tmp:
        onto(
            base,
            Path(tmp, "mod.gguf"),
            SynthesisOptions(units=units, layers="2-", kv_window=64),
            rounds=4,
        )
        file = GGUFFile.open(Path(tmp, "mod.gguf"))
        config, routers = schema.read_routers(file)
        tensors = {
            name: array.copy()
            for name, array in schema.to_tensors(config, routers, schema.hf_tensor_names).items()
        }
        folder.mkdir(parents=True)
        save_file(tensors, folder / adapter_files.ROUTERS)
        identity = gguf_identity(GGUFFile.open(base)) | {"name": base.name}
        (folder / adapter_files.MOD_JSON).write_text(
            json.dumps({"mod": config.to_dict(), "base": identity})
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as exc:
        sys.exit(f"error: {exc}")
