"""The part of SmolLM2 that travels to a GPU machine, and its logits on the CPU.

    write(folder)      # base.gguf, and for each kind of units its routers (.gguf) and logits (.npz)

The model has the first layers and the first rows of the embedding, and no vocabulary: all of it is
too much for one package. Tokens travel with the logits. parity.py makes a MoD file of base.gguf
and routers, in F32, with file().
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from mod_export.common.files import atomic_file
from mod_export.config import MoDConfig
from mod_export.data.text import default_texts
from mod_export.errors import UserError
from mod_export.formats import adapter_files, hub, schema
from mod_export.formats.ggml_types import dequantize
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.gguf import write as write_gguf
from mod_export.units import units_of

UNITS = ("kv", "attn", "block")
LAYERS, ROWS = 8, 2048
KV_WINDOW = 32  # tokens; the sequences are short
PROMPT, DECODED, UBATCH = 224, 64, 64  # tokens, across a multiple of 256 cells
EMBEDDING = "token_embd.weight"


def write(folder: Path) -> None:
    """Write all that travels. Needs the embedded model and the patched library."""
    folder.mkdir(parents=True)
    source = GGUFFile.open(hub.embedded_gguf())
    cut(source, folder / "base.gguf")
    tokens = some_tokens()
    with tempfile.TemporaryDirectory() as tmp:
        for units in UNITS:
            config, routers = packaged() if units == "kv" else random(units, Path(tmp))
            keys = [("general.architecture", "string", "llama")]
            keys += [
                ("llama.block_count", "u32", LAYERS),
                ("llama.embedding_length", "u32", source.model_number("embedding_length")),
                (
                    "llama.attention.head_count_kv",
                    "u32",
                    source.get("llama.attention.head_count_kv"),
                ),
            ]
            with (folder / f"{units}.gguf").open("wb") as out:
                added = schema.to_keys("llama", config)
                write_gguf(out, [*keys, *added], schema.to_tensors(config, routers))
            target = file(folder, units, Path(tmp))
            figures = evaluate(target, tokens, flash_attn=False, gpu_layers=0)
            figures["logits"] = figures["logits"].astype(np.float16)
            np.savez(folder / f"{units}.npz", tokens=tokens, **figures)


def cut(source: GGUFFile, target: Path, rows: int | None = ROWS) -> None:
    """Write the first layers, with the first rows of the embedding in F32 and no vocabulary.

    rows: None for all rows as they are, and the vocabulary.
    """
    kept = {name: name for name in source.tensors if _layer(name) < LAYERS}
    changes: dict = {"changed_keys": {"llama.block_count": LAYERS}}
    if rows:
        embedding = source.tensors[EMBEDDING]
        data = np.frombuffer(embedding.data, np.uint8).reshape(embedding.shape[1], -1)[:rows]
        changes["changed_keys"]["llama.vocab_size"] = rows
        changes["dropped_keys"] = {name for name in source.keys if name.startswith("tokenizer.")}
        changes["added_keys"] = [("tokenizer.ggml.model", "string", "no_vocab")]
        changes["added_tensors"] = {EMBEDDING: dequantize(data, embedding.type)}
        del kept[EMBEDDING]
    with target.open("wb") as out:
        rewrite(source, out, kept_tensors=kept, **changes)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def some_tokens() -> np.ndarray:
    """The tokens of the packaged text that the cut embedding has."""
    from mod_export.runtime.llama import MoDLlama

    llm = MoDLlama(hub.embedded_gguf(), vocab_only=True)
    tokens = np.array(llm.tokenize(default_texts()[0].encode()))
    return tokens[tokens < ROWS][: PROMPT + DECODED]


def packaged() -> tuple[MoDConfig, dict]:
    """Configuration and routers of the packaged adapter, for the first layers."""
    found = adapter_files.read(adapter_files.resolve("smollm2-kv"))
    units = found.config.units["kv"]
    n = LAYERS * units.heads
    units = replace(
        units, threshold=units.threshold[:n], activation=units.activation[:n], window=()
    )
    config = replace(found.config, units={"kv": units}, kv_window=KV_WINDOW)
    return config, {unit: router for unit, router in found.routers.items() if unit.layer < LAYERS}


def random(units: str, folder: Path) -> tuple[MoDConfig, dict]:
    """Random routers whose biases fit text: about half of the tokens are active."""
    from mod_export.synthetic.onto_base import onto
    from mod_export.synthetic.routers import SynthesisOptions

    base, target = folder / f"{units}-base.gguf", folder / f"{units}-random.gguf"
    cut(GGUFFile.open(hub.embedded_gguf()), base, rows=None)
    onto(base, target, SynthesisOptions(units=units, layers="2-"), rounds=4)
    return schema.read_routers(GGUFFile.open(target))


def file(folder: Path, units: str, work: Path) -> Path:
    """A MoD file in F32, written into `work`, of what write() has put into `folder`."""
    base, target = work / "base-f32.gguf", work / f"parity-{units}.gguf"
    if not base.is_file():
        widen(folder / "base.gguf", base)
    config, routers = schema.read_routers(GGUFFile.open(folder / f"{units}.gguf"))
    with atomic_file(target, force=True) as tmp, tmp.open("wb") as out:
        schema.write_routers(GGUFFile.open(base), out, config, routers)
    return target


def widen(source: Path, target: Path) -> None:
    """Write the weights of a quantised file in F32."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 0, True, os.cpu_count()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    with atomic_file(target) as tmp:
        if llama_cpp.llama_model_quantize(str(source).encode(), str(tmp).encode(), params):
            raise UserError(f"cannot make an F32 file of {source}")


def evaluate(
    file: str | Path,
    tokens: np.ndarray,
    flash_attn: bool,
    gpu_layers: int,
    threads: int | None = None,
) -> dict:
    """Logits [T, n_vocab], decisions and router logits [T, n_units], units, thresholds, graphs.

    The prompt is read in ubatches, the rest token by token. graphs: of each token of that rest.
    """
    from mod_export.runtime.llama import MoDLlama

    llm = MoDLlama(
        file,
        n_ctx=PROMPT + DECODED,
        n_batch=UBATCH,
        n_ubatch=UBATCH,
        logits_all=True,
        flash_attn=flash_attn,
        type_k=int(flash_attn),
        type_v=int(flash_attn),
        n_gpu_layers=gpu_layers,
        threads=threads,
    )
    tokens = tokens.tolist()
    with llm.recording() as batches:
        llm.eval(tokens[:PROMPT])
        before = llm.perf().graphs
        for token in tokens[PROMPT:]:
            llm.eval([token])
    active, score = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    units = np.array([(*unit, *[""] * (3 - len(unit))) for unit in units_of(llm.units)])
    figures = {
        "logits": llm.scores[: len(tokens)].copy(),
        "active": active.astype(bool),
        "score": score,
        "units": units,
        "p": np.array(llm.thresholds),
        "graphs": (llm.perf().graphs - before) / DECODED,
    }
    llm.close()
    return figures
