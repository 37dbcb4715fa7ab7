"""A GGUF file, MoD or dense, as a Reader: see readers.py.

Example:

    reader = RuntimeReader("mod.gguf", threads=2)
"""

from __future__ import annotations

import torch

from mod_export.config import MoDConfig
from mod_export.evaluation.readers import CHUNK_TOKENS, UNLIMITED_TOKENS, Reader
from mod_export.formats import gguf_adapter
from mod_export.formats.kv_size import kv_layers
from mod_export.formats.kv_types import KVTypes
from mod_export.formats.schema import from_keys
from mod_export.runtime import devices
from mod_export.runtime.batch_logits import BatchLogitsLlama
from mod_export.runtime.templates import ChatTemplate


class RuntimeReader(Reader):
    """Reads a sequence with llama.cpp.

    force and shift: as those of MoDLlama; dense files have neither. types: of K and V. Without them
    F32 files run with K/V in F32 and without flash attention, as in parity.py, so that they give
    torch's figures; other files run as they are used. mod: routers that are put beside the file.
    """

    def __init__(
        self,
        path,
        force: str = "none",
        shift: float = 0.0,
        threads: int | None = None,
        gpu_layers: int = 0,
        types: KVTypes | None = None,
        mod: str | None = None,
    ):
        super().__init__()
        devices.check(gpu_layers)
        file = gguf_adapter.with_routers(path, mod)
        self.name = str(path)
        self.force, self.shift = force, shift
        self.routers = None if mod is None else gguf_adapter.locate(mod)
        self._options = {
            "n_batch": CHUNK_TOKENS,
            "threads": threads,
            "n_gpu_layers": gpu_layers,
            "threshold_shift": shift,
            "mod": self.routers,
        }
        if types:
            self._options |= types.options()
        elif file.get("general.file_type") == 0:
            self._options |= {"flash_attn": False, "type_k": 0, "type_v": 0}
        self.n_ctx = file.get(f"{file.architecture}.context_length") or UNLIMITED_TOKENS
        self.windows = {
            number: layer.window
            for number, layer in enumerate(kv_layers(file))
            if layer.bytes_per_token
        }
        self._open(CHUNK_TOKENS)
        self.llm.require_vocab()
        self.tokenizer = _Tokenizer(self)
        self.config = from_keys(file) or MoDConfig()
        self.n_vocab = self.llm.n_vocab()

    def _open(self, n_ctx: int) -> None:
        self.llm = BatchLogitsLlama(self.name, n_ctx=min(n_ctx, self.n_ctx), **self._options)
        if self.llm.units:
            self.llm.force = self.force

    def dense(self) -> RuntimeReader:
        return RuntimeReader(
            self.name,
            "active",
            threads=self._options["threads"],
            gpu_layers=self._options["n_gpu_layers"],
            mod=self._options["mod"],
        )

    def read(self, tokens: list[int], all_rows: bool) -> torch.Tensor:
        self.llm.all_rows = all_rows
        with self.llm.recording() as batches:
            self.llm.eval(tokens)
        ((active, _),) = batches
        self._decisions.append(
            torch.from_numpy(active).bool().reshape(len(tokens), len(self.units))
        )
        return torch.from_numpy(self.llm.logits)

    def reserve(self, n_tokens: int) -> None:
        super().reserve(n_tokens)
        if n_tokens > self.llm.n_ctx():
            self.llm.close()
            self._open(n_tokens)

    def reset(self) -> None:
        super().reset()
        self.llm.reset()
        self._keep_tails(0)

    def mark(self) -> None:
        super().mark()
        self._marked_tokens = self.llm.n_tokens
        # `rewind` needs K/V that the tokens that follow could free.
        self._keep_tails(self.llm.n_ctx())

    def rewind(self) -> None:
        super().rewind()
        self.llm.n_tokens = self._marked_tokens  # the next eval removes the K/V behind it

    def _keep_tails(self, n_tokens: int) -> None:
        if self.llm.units:
            self.llm.kv_rollback = n_tokens


class _Tokenizer:
    """The file's vocabulary as a tokenizer of transformers, as far as an evaluation needs it."""

    def __init__(self, reader: RuntimeReader):
        self._reader = reader  # not its llm, which gives way to another in `reserve`
        self.bos_token_id, self.eos_token_id = reader.llm.token_bos(), reader.llm.token_eos()
        self.chat_template = reader.llm.metadata.get("tokenizer.chat_template")

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        return {
            "input_ids": self._reader.llm.tokenize(
                text.encode(), add_bos=add_special_tokens, special=True
            )
        }

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._reader.llm.piece(token, special=True) for token in ids).decode(
            "utf-8", "replace"
        )

    def apply_chat_template(self, messages: list[dict], **_options) -> str:
        return ChatTemplate.of(self._reader.llm).apply(messages)
