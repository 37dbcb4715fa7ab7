"""SafeLlama: llama_cpp.Llama whose mistakes are a UserError instead of the end of the process.

    llm = SafeLlama(model_path="model.gguf", embedding=True)
    llm.embed(["Hello", "World"])

MoDLlama is one, and says what a MoD file has on top.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import hub, kv_types
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import embeddings as texts_to_vectors
from mod_export.runtime import tokens
from mod_export.runtime.checked_sampler import (
    CallbackErrors,
    CheckedSampler,
    check_grammar,
    check_sampling,
    row_logits,
)
from mod_export.runtime.guard import Guard, InputError, guard_methods, unguarded
from mod_export.runtime.log import kept_log

import llama_cpp  # isort: skip

GENERATE = inspect.signature(llama_cpp.Llama.generate)

# Values with which llama.cpp ends the process, or takes memory that it does not own.
MAX_INT32 = (1 << 31) - 1
DEFAULT_BATCH = 512  # of llama_cpp.Llama
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ of llama-cparams.h
MAX_THREADS = 512  # GGML_MAX_N_THREADS of ggml.h
LIMITS = {
    "n_ctx": (0, MAX_INT32),
    "n_batch": (1, MAX_INT32),
    "n_ubatch": (1, MAX_INT32),
    "n_seq_max": (1, MAX_SEQUENCES),
    "n_threads": (1, MAX_THREADS),
    "n_threads_batch": (1, MAX_THREADS),
}


def _values(prefix: str) -> frozenset[int]:
    """The values of an enum of llama.h."""
    return frozenset(getattr(llama_cpp, name) for name in dir(llama_cpp) if name.startswith(prefix))


CHOICES = {
    "pooling_type": _values("LLAMA_POOLING_TYPE_"),
    "attention_type": _values("LLAMA_ATTENTION_TYPE_"),
    "rope_scaling_type": _values("LLAMA_ROPE_SCALING_TYPE_"),
    "split_mode": _values("LLAMA_SPLIT_MODE_"),
}
KV_SIDES = {"type_k": "K", "type_v": "V"}


class SafeLlama(llama_cpp.Llama):
    """llama_cpp.Llama with one lock, checked arguments and right embeddings.

    One thread at a time is inside. A stream lets others have their turn between two tokens, and
    reads its own tokens again where another call has used the context meanwhile. A closed object
    raises UserError; wrong arguments raise InputError, which is a UserError and a ValueError.
    """

    n_batch: int
    n_tokens: int
    input_ids: np.ndarray
    _guard: Guard
    _changes = 0  # how often calls have changed what the context holds
    _quiet = True

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        guard_methods(cls)

    def __init__(self, model_path: str, **kwargs: Any):
        self._guard = Guard()
        kwargs = check_options(kwargs)
        check_kv_types(model_path, kwargs, kwargs.get("flash_attn", False))
        if (lora := kwargs.get("lora_path")) is not None:
            if not os.path.isfile(lora):
                raise InputError(f"{lora} is no file", "check the path of the LoRA adapter")
            kwargs["lora_path"] = os.fspath(lora)
        if kwargs.get("embedding"):
            # A sequence has to be computed in one part to be pooled, and all have to fit one part.
            size = kwargs.get("n_ubatch", kwargs.get("n_batch", DEFAULT_BATCH))
            kwargs["n_batch"] = min(size, kwargs.get("n_batch", DEFAULT_BATCH))
            kwargs["n_ubatch"] = size
        super().__init__(model_path, **kwargs)
        if lora is not None and not self._lora_adapter:
            raise InputError(f"{lora} is no LoRA adapter of this model", "give one that is")
        self._vocab = tokens.CheckedTokenizer(self, self._guard)
        if kwargs.get("tokenizer") is None:
            self.tokenizer_ = self._vocab
        self._size_buffers()

    def _size_buffers(self) -> None:
        """Forget all tokens, and have room for as many as the context has.

        llama.cpp rounds the context up, and llama_cpp.Llama does not know of it.
        """
        self.reset()
        self._n_ctx = self.n_ctx()
        self.n_batch = min(self.n_batch, llama_cpp.llama_n_batch(self.ctx))
        self.input_ids = np.zeros(self._n_ctx, np.intc)
        if self._logits_all:
            self.scores = np.empty((self._n_ctx, self._n_vocab), np.single)

    @unguarded
    def close(self) -> None:
        """Free the context and the model, after the call or the token in work. Twice is fine."""
        guard = self.__dict__.get("_guard")  # not where __init__ refused the file
        if guard is None:
            return
        with guard.lock:
            guard.closed = True
            if hasattr(self, "_stack"):
                with self.errors_kept():  # It warns of buffers that grew for pieces of graphs.
                    super().close()

    @unguarded
    def errors_kept(self):
        """Collect llama.cpp's errors, see log.kept_log; with `verbose` llama.cpp prints them."""
        return kept_log(self._quiet)

    # --- tokens

    @property
    def has_vocab(self) -> bool:
        """Whether the file holds a tokenizer; a file without one still has a number of tokens."""
        return self._vocab.has_vocab

    def require_vocab(self) -> None:
        """Raise UserError for a file without a tokenizer, where llama.cpp would abort on text."""
        self._vocab.require_vocab()

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; those of a control token only with `special`."""
        return self._vocab.piece(token, special)

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return llama_cpp.llama_vocab_is_eog(self._model.vocab, *self._ids([token]))

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, such as the end of a turn."""
        return self._vocab.is_control(token)

    def token_text(self, token: int) -> str:
        """The text of a token as the vocabulary has it; empty for an id that is no token's."""
        return self._vocab.text(token) if token in range(self._n_vocab) else ""

    def tokenizer(self) -> tokens.CheckedTokenizer:
        """The tokenizer of the file."""
        return tokens.CheckedTokenizer(self, self._guard)

    def _ids(self, ids: Iterable[int]) -> list[int]:
        return tokens.token_ids(ids, self._n_vocab)

    # --- evaluation and sampling

    def set_cache(self, cache: Any) -> None:
        """Set the cache of states, or take it away with None."""
        if cache is not None and not hasattr(type(cache), "__setitem__"):
            raise InputError(f"{type(cache).__name__} is no cache", "use llama_cpp.LlamaRAMCache()")
        super().set_cache(cache)

    def set_seed(self, seed: int) -> None:
        """Set the seed of the next completions."""
        try:
            super().set_seed(operator.index(seed))
        except TypeError:
            raise InputError(f"seed {seed!r} is no whole number", "use an int") from None

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits of the tokens in the context with logits_all, else of the last one.

        llama_cpp.Llama gives memory that was never written where logits_all is off.
        """
        if self._logits_all or self._requires_eval or not self.n_tokens:
            rows = self.scores[: self.n_tokens] if self._logits_all else self.scores[:0]
            return deque(rows.tolist(), maxlen=self._n_ctx)
        return deque([self.last_logits().tolist()], maxlen=1)

    def last_logits(self) -> np.ndarray:
        """Logits of the last batch's last row, float32 [n_vocab], valid until the next batch."""
        return row_logits(self._ctx, -1, self._n_vocab)

    def _init_sampler(self, logits_processor=None, grammar=None, **options) -> CheckedSampler:
        check_sampling(options)
        if grammar is not None:
            check_grammar(grammar, self._model.vocab)
        processors = None
        if logits_processor is not None:
            processors = CallbackErrors(_callables(logits_processor, "logits_processor"))
        chain = super()._init_sampler(
            logits_processor=processors and [processors], grammar=grammar, **options
        )
        can_fail = processors is not None or grammar is not None
        return CheckedSampler(chain, self._n_vocab, processors, can_fail)

    def reset(self) -> None:
        """Forget the tokens that were read."""
        self._changes += 1
        super().reset()

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens like llama_cpp.Llama.eval."""
        self._changes += 1
        super().eval(self._ids(tokens))

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Draw a token like llama_cpp.Llama.sample. Raises InputError where nothing was read."""
        if self.n_tokens == 0 or self._requires_eval:
            raise InputError("no logits to sample from", "evaluate tokens first")
        try:
            return super().sample(*args, **kwargs)
        except BaseException:
            self._sampler = None
            raise

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator:
        """Generate like llama_cpp.Llama.generate.

        The stream goes on with its own tokens whatever else the context was used for between two
        of its steps.
        """
        options = GENERATE.bind(self, tokens, *args, **kwargs).arguments
        options.pop("self")
        options["tokens"] = self._ids(tokens)
        if not options["tokens"] and (options.get("reset", True) or not self.n_tokens):
            raise InputError("the prompt has no tokens", "give at least one token")
        options["stopping_criteria"] = self._criteria(options.get("stopping_criteria"))
        self._before_generation(options["tokens"], options.get("reset", True))
        steps, sent = super().generate(**options), None
        read, known = np.zeros(self._n_ctx, np.intc), 0  # what the context holds for this stream
        try:
            while True:
                token = steps.send(sent)
                n, changes = self.n_tokens, self._changes
                read[known:n] = self.input_ids[known:n]
                known = n if self.draft_model is None else 0  # tokens of a draft are taken back
                sampler, self._sampler = self._sampler, None
                sent = yield token
                sent = None if sent is None else self._ids(sent)
                if (n, changes) != (self.n_tokens, self._changes):
                    self._read_again(read[:n])
                self._sampler = sampler
        except StopIteration:
            self._sampler = None
        except Exception:
            self._sampler = None
            raise
        finally:
            steps.close()

    def _before_generation(self, ids: list[int], reset: bool) -> None:
        """What a subclass does before the first step of a generation from tokens.

        reset: they are the whole text, of which the context may hold the beginning.
        """

    def _read_again(self, ids: np.ndarray) -> None:
        """Have the context hold these tokens, which it does where no other call has used it."""
        if np.array_equal(self._input_ids, ids):
            return
        self.n_tokens = self.longest_token_prefix(self._input_ids, ids)
        self.eval(ids[self.n_tokens :].tolist())

    def _criteria(self, criteria: Any) -> _Criteria | None:
        if criteria is None or isinstance(criteria, _Criteria):
            return criteria
        return _Criteria(self, _callables(criteria, "stopping_criteria"))

    # --- completions

    def _create_completion(self, **options: Any) -> Generator:
        """What create_completion and __call__ run, with checked options."""
        _check_completion(self, options)
        options["stopping_criteria"] = self._criteria(options.get("stopping_criteria"))
        if (bias := options.pop("logit_bias", None)) is not None:
            # llama_cpp loses both the bias and the processors where both are given.
            processors = _callables(options.get("logits_processor") or [], "logits_processor")
            options["logits_processor"] = [*processors, _Bias(bias, self._n_vocab)]
        if options.get("suffix") is not None:
            options["prompt"] = self._infill(options["prompt"], options.pop("suffix"))
        try:
            yield from super()._create_completion(**options)
        except ValueError as exc:
            if "context window" not in str(exc):
                raise
            raise InputError(str(exc), "use a larger context or a shorter prompt") from exc

    def _infill(self, prompt: str, suffix: str) -> list[int]:
        """The tokens of a prompt whose middle is to be written; llama_cpp takes token 0 for it."""
        model = self._model
        before, after, middle = model.token_prefix(), model.token_suffix(), model.token_middle()
        if min(before, after, middle) < 0:
            raise InputError(
                f"{self.model_path} has no tokens for text before and after a gap",
                "leave suffix out, or use a model that was trained to fill in the middle",
            )
        if not isinstance(prompt, str):
            raise InputError("suffix needs a prompt that is a text", "give a str")
        first = [before, *self.tokenize(tokens.utf8(prompt), False)]
        second = [after, *self.tokenize(tokens.utf8(suffix), False)]
        bos = [model.token_bos()] if model.add_bos_token() and model.token_bos() >= 0 else []
        parts = second + first if self.spm_infill else first + second
        return [*bos, *parts, middle]

    def create_chat_completion(self, messages: list[dict], *args: Any, **kwargs: Any) -> Any:
        """Answer messages like llama_cpp.Llama.create_chat_completion."""
        if not isinstance(messages, list | tuple) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            for message in messages
        ):
            raise InputError("messages is a list of dicts with role and content", "give such ones")
        return super().create_chat_completion(messages, *args, **kwargs)

    # --- embeddings

    def embed(
        self,
        input: str | list[str],
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """Embeddings like llama_cpp.Llama.embed: of a text, or a list of them for several texts.

        Those of texts in one batch are right for every pooling type, see `embeddings`.
        """
        single = isinstance(input, str)
        if not single and not isinstance(input, list | tuple):
            raise InputError(f"embed takes texts, not {type(input).__name__}", "give a str or list")
        vectors, count = texts_to_vectors.embed(
            self, [input] if isinstance(input, str) else list(input), normalize, truncate
        )
        output = vectors[0] if single else vectors
        return (output, count) if return_count else output

    # --- copies, and files of the hub

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        additional_files: list | None = None,
        local_dir: str | os.PathLike | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> SafeLlama:
        """Open a file of the Hugging Face hub, which a name or a glob pattern names.

        local_dir_use_symlinks has no meaning any more in huggingface_hub. Raises UserError where
        the hub cannot be reached, and where none or several files match.
        """
        path = hub.download(
            repo_id, filename, additional_files or (), local_dir=local_dir, cache_dir=cache_dir
        )
        return cls(model_path=path, **kwargs)


guard_methods(SafeLlama, llama_cpp.Llama)


class _Criteria:
    """Stopping criteria with the logits that the token was drawn from.

    llama_cpp.Llama gives them those of the first token, or memory that was never written.
    """

    def __init__(self, llm: SafeLlama, criteria: Sequence[Callable]):
        self._llm, self._criteria = llm, criteria

    def __call__(self, ids: np.ndarray, _logits: np.ndarray) -> bool:
        llm = self._llm
        logits = llm.scores[len(ids) - 1] if llm._logits_all else llm.last_logits()
        return any(criterion(ids, logits) for criterion in self._criteria)


class _Bias:
    """A logits processor that adds to the logits of some tokens."""

    def __init__(self, bias: dict, n_vocab: int):
        if not isinstance(bias, dict):
            raise InputError("logit_bias is a dict of token ids to numbers", "give a dict")
        try:
            keys, self._values = [int(k) for k in bias], [float(v) for v in bias.values()]
        except (TypeError, ValueError):
            raise InputError(
                "logit_bias has a key or a value that is no number", "use token ids and numbers"
            ) from None
        self._ids = tokens.token_ids(keys, n_vocab)

    def __call__(self, _ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        changed = logits.copy()
        changed[self._ids] += np.array(self._values, np.single)
        return changed


def _callables(given: Any, name: str) -> list[Callable]:
    """One function or several as a list."""
    functions = list(given) if isinstance(given, Iterable) else [given]
    if not all(map(callable, functions)):
        raise InputError(f"{name} has something that is no function", "give functions")
    return functions


def _check_completion(llm: SafeLlama, options: dict) -> None:
    """Raise InputError for options of a completion that llama_cpp would not understand."""
    prompt, logprobs = options["prompt"], options.get("logprobs")
    if isinstance(prompt, str | bytes):
        tokens.utf8(prompt, "the prompt")
    else:
        options["prompt"] = prompt = llm._ids(prompt)
        if options.get("echo"):
            raise InputError("echo needs a prompt that is a text", "detokenize the prompt")
    begins = isinstance(prompt, str) and llm._model.add_bos_token() and llm.token_bos() >= 0
    if not len(prompt) and not begins:
        raise InputError("the prompt is empty", "give at least one token")
    if logprobs is not None:
        if not isinstance(logprobs, int) or logprobs < 0:
            raise InputError(f"logprobs {logprobs!r} is no number of tokens", "use 0 or more")
        if not llm._logits_all:
            raise InputError("logprobs need the logits of all tokens", "open with logits_all=True")
    stop = options.get("stop")
    if stop is not None and not isinstance(stop, str):
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) for s in stop):
            raise InputError("stop is a text or a list of texts", "give such ones")
        options["stop"] = list(stop)


def check_options(options: dict) -> dict:
    """The options, with types of K and V as numbers.

    Raises InputError for options with which llama.cpp ends the process.
    """
    for name, (least, most) in LIMITS.items():
        value = options.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or not least <= value <= most:
            raise InputError(
                f"{name} {value!r} is wrong", f"use a whole number from {least} to {most}"
            )
    for name, choices in CHOICES.items():
        value = options.get(name)
        if value is not None and value not in choices:
            listed = ", ".join(map(str, sorted(choices)))
            raise InputError(f"{name} {value!r} is unknown", f"use one of {listed}")
    options = dict(options)
    for name, side in KV_SIDES.items():
        if options.get(name) is not None:
            options[name] = _checked(kv_types.type_number, options[name], side)
    return options


def check_kv_types(model_path: str, types: dict, flash_attn: bool) -> None:
    """Raise InputError where K and V of the model cannot have these types.

    types: numbers of `type_k` and `type_v`; those that are missing are f16.
    """
    f16 = kv_types.NUMBERS[kv_types.DEFAULT_TYPE]
    k, v = (f16 if types.get(name) is None else types[name] for name in KV_SIDES)
    if k != v or kv_types.is_quantised(k):  # reading a large vocabulary takes a moment
        _checked(kv_types.check_types, GGUFFile.open(model_path), k, v, flash_attn)


def _checked(check: Callable, *arguments: Any) -> Any:
    """What a function of `formats` returns; its UserError as an InputError."""
    try:
        return check(*arguments)
    except UserError as exc:
        raise InputError(exc.message, exc.cure) from None
