"""Documents and conversations for tests of training data."""

import gzip
import json
from pathlib import Path

import torch

from tests.support.byte_tokenizer import TEXT

CHAT = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello\n\n  you 🐛 \n"},
    {"role": "user", "content": "And now? <b>"},
    {"role": "assistant", "content": "Ωmega, 12.5 % of it"},
]


DOCUMENTS = [f"Document {i}\n\n{TEXT[i * 100 : i * 100 + 300 + 40 * i]}" for i in range(12)]


def write(path: Path, content) -> Path:
    """Write text, or a list of records as JSONL, gzipped where the name says so."""
    text = (
        content
        if isinstance(content, str)
        else "".join(json.dumps(record) + "\n" for record in content)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def all_ids(packed) -> torch.Tensor:
    return torch.stack([packed[i]["input_ids"] for i in range(len(packed))])


def answers_of(tokenizer, packed) -> str:
    """Return the marked tokens of the whole row.

    The tokens that begin a sequence are among them, and count for nothing there.
    """
    ids, marks, _ = packed.source.read(0, packed.source.count)
    return tokenizer.decode(ids[marks])
