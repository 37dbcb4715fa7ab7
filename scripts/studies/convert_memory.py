"""How much memory a conversion takes, by the size of the model: SmolLM2, and random models.

    python -m scripts.studies.convert_memory --out convert-memory smollm2
    python -m scripts.studies.convert_memory --out convert-memory --tokens 2048 1b 3b 1b:12 1b:24

`1b` and `3b` have the shapes of Llama 3.2, with random weights in bfloat16 in files of 1 GB, and
`1b:24` has 24 layers. A conversion runs in a process of its own. Its time, the processor's time and
the peak of its resident memory are what the system counts; resident memory holds the parts of the
mapped files that were read. The anonymous part of it, which is what the process itself takes, is
sampled. Rows go to OUT/rows.jsonl.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from transformers import LlamaConfig

from mod_export.common.tables import format_table
from mod_export.errors import UserError
from mod_export.formats import hub, safetensors_writing
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.safetensors_writing import StoredTensor
from mod_export.model import gguf_tokenizer, streaming
from scripts.studies import rows

SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    },
}
COMMON = {"intermediate_size": 8192, "num_key_value_heads": 8, "vocab_size": 128256}
FILE_BYTES = 1 << 30
SAMPLE_SECONDS = 0.1


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write in.")
@click.option("--tokens", type=int, help="To calibrate on.  [default: all of the packaged text]")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--calibration-text", type=click.Path(exists=True), help="Where time is short.")
@click.option("--kv-window", help="As `convert` takes it.")
def main(models, out, tokens, **options):
    out.mkdir(parents=True, exist_ok=True)
    for name in models:
        model = name if name == hub.EMBEDDED else random_model(name, out)
        row = {"model": name, "tokens": tokens, **options}
        row |= converted(model, out / "mod", options | {"calibration_tokens": tokens})
        rows.append(out / "rows.jsonl", row)
    found = rows.read(out / "rows.jsonl")
    click.echo(format_table(list(found[-1]), [list(row.values()) for row in found]))


def converted(model: str | Path, target: Path, options: dict) -> dict:
    """Return time and peaks of memory of a conversion for kv units."""
    command = [sys.executable, "-m", "mod_export", "convert", str(model), "-o", str(target)]
    command += ["--force"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)] if value else []
    row = measured(command, f"the conversion of {model}")
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return row | {"written MB": round(written / 1e6, 3)}


def measured(command: list[str], what: str) -> dict:
    """Return time and peaks of memory of a command. Raises UserError where it fails."""
    start, anonymous, resident, done = time.monotonic(), 0, 0, 0
    process = subprocess.Popen(command)
    while not done:
        sizes = dict(memory_of(process.pid))
        anonymous = max(anonymous, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
        # The system's ru_maxrss counts what this process had when it made the other one.
        resident = max(resident, sizes.get("VmHWM", 0))
        time.sleep(SAMPLE_SECONDS)
        done, status, used = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise UserError(f"{what} failed", "see its message")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "processor seconds": round(used.ru_utime + used.ru_stime, 1),
        "resident MB": resident // 10**6,
        "anonymous MB": anonymous // 10**6,
    }


def memory_of(pid: int) -> Iterator[tuple[str, int]]:
    """Yield the figures of memory of a process in bytes; none when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        if line.endswith("kB"):
            name, size, _ = line.split()
            yield name.rstrip(":"), int(size) * 1024


def random_model(name: str, out: Path) -> Path:
    """Write a random model as a directory, unless it is there, and return its path."""
    shape, _, n_layer = name.partition(":")
    fields = COMMON | SHAPES[shape] | ({"num_hidden_layers": int(n_layer)} if n_layer else {})
    directory = out / name.replace(":", "-")
    if directory.is_dir():
        return directory
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(**fields, tie_word_embeddings=True, max_position_embeddings=8192)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    with streaming.without_weights():
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    directory.mkdir()
    config.save_pretrained(directory)
    gguf_tokenizer.read_tokenizer(GGUFFile.open(hub.embedded_gguf())).save_pretrained(directory)
    tensors = [
        StoredTensor(key, "BF16", tuple(value.shape), lambda k=key, v=value: random_bytes(k, v))
        for key, value in base.named_parameters()
    ]
    safetensors_writing.write(safetensors_writing.in_shards(tensors, FILE_BYTES), directory)
    return directory


def random_bytes(name: str, like: torch.Tensor) -> Iterator[memoryview]:
    """Yield the values of a matrix, or ones where it is a norm, some rows at a time."""
    generator = torch.Generator().manual_seed(len(name))
    for rows_here in torch.empty(like.shape[0], 0).split(4096):
        shape = len(rows_here), *like.shape[1:]
        values = torch.ones(shape)
        if len(shape) > 1:
            values = torch.randn(shape, generator=generator) * 0.02
        yield memoryview(values.bfloat16().flatten().view(torch.uint8).numpy())


if __name__ == "__main__":
    main()
