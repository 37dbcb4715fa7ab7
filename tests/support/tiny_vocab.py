"""Tiny random models with a whole vocabulary: byte pairs, SentencePiece, and Gemma 3.

write(tmp_path / "spm.gguf", "spm")          # a file that opens, tokenizes and chats
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny_gguf import Tiny

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}"
)
N_VOCAB = 320
Type = gguf.TokenType


class BytePairs(Tiny):
    """The 256 bytes, a few merges, control and user-defined tokens."""

    def _write_vocab(self, w: gguf.GGUFWriter) -> None:
        letters = byte_letters()
        merges = ["t h", "th e", "\u0120 the", "l o", "lo w", "\u0120 a", "i n", "e r"]
        tokens = ["<s>", "</s>", "<|im_end|>", "<tool>", *letters]
        tokens += [merge.replace(" ", "") for merge in merges]
        types = [Type.CONTROL] * 3 + [Type.USER_DEFINED]
        tokens, types = filled(tokens, types)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        w.add_token_list(tokens)
        w.add_token_types(types)
        w.add_token_merges(merges)
        write_special(w)


class Pieces(Tiny):
    """The pieces of SentencePiece: bytes, words with a score, control and user-defined tokens."""

    def _write_vocab(self, w: gguf.GGUFWriter) -> None:
        tokens = ["<unk>", "<s>", "</s>", "<tool>", *(f"<0x{byte:02X}>" for byte in range(256))]
        types = [Type.UNKNOWN, Type.CONTROL, Type.CONTROL, Type.USER_DEFINED] + [Type.BYTE] * 256
        tokens += ["\u2581", "\u2581t", "h", "e", "he", "\u2581the", "l", "o", "lo", "w", "in"]
        tokens, types = filled(tokens, types)
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        w.add_token_list(tokens)
        w.add_token_scores([-float(number) for number in range(len(tokens))])
        w.add_token_types(types)
        write_special(w)


class Gemma3(Pieces):
    """Gemma 3, with sliding layers and norms of its own; dense."""

    def __post_init__(self):
        super().__post_init__()
        self.arch = "gemma3"
        head = self.n_embd // self.n_head
        for layer in range(self.n_layer):
            for name in ("post_attention_norm", "post_ffw_norm"):
                self.tensors[f"blk.{layer}.{name}.weight"] = np.ones(self.n_embd, np.float32)
            for name in ("attn_q_norm", "attn_k_norm"):
                self.tensors[f"blk.{layer}.{name}.weight"] = np.ones(head, np.float32)

    def _write_vocab(self, w: gguf.GGUFWriter) -> None:
        w.add_sliding_window(16)
        w.add_key_length(self.n_embd // self.n_head)
        w.add_value_length(self.n_embd // self.n_head)
        super()._write_vocab(w)


def byte_letters() -> list[str]:
    """Return the letters that stand for the bytes 0 to 255 in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def filled(tokens: list[str], types: list[Type]) -> tuple[list[str], list[Type]]:
    """Return tokens and types, filled to N_VOCAB with normal and unused tokens."""
    types = types + [Type.NORMAL] * (len(tokens) - len(types))
    unused = [f"<unused{number}>" for number in range(N_VOCAB - len(tokens))]
    return tokens + unused, types + [Type.UNUSED] * len(unused)


def write_special(w: gguf.GGUFWriter) -> None:
    """Write the ids of special tokens and a chat template."""
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_chat_template(TEMPLATE)


SIZES = {"n_layer": 3, "n_embd": 64, "n_head": 2, "n_head_kv": 1, "n_ff": 64, "n_vocab": N_VOCAB}
MODELS = {
    "bpe": lambda: BytePairs(**SIZES).route((1, 2), "kv+ffn"),
    "spm": lambda: Pieces(**SIZES).route((2,), "attn").route((1,), "block"),
    "gemma3": lambda: Gemma3(**SIZES),
}


def write(path: Path, name: str) -> Path:
    """Write one of MODELS."""
    return MODELS[name]().write(path)
