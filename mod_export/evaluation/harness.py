"""lm-evaluation-harness on our models: one model class for directories in torch and GGUF files.

    run(["--tasks", "arc_easy"], "mod.gguf", threshold_shift=0.5)       # as its command line does

    import mod_export.evaluation.harness                        # registers the class `mod-export`
    lm_eval.simple_evaluate("mod-export", {"pretrained": "mod.gguf"}, tasks=["arc_easy"])

llama-server gives no log likelihoods of a prompt, so that the harness cannot score choices with it.
This class reads a model as `mod-export eval` does (readers.py): the same figures come out where the
texts are the same. Texts become tokens as in the harness's own class `hf`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mod_export.data.text import bos
from mod_export.errors import UserError
from mod_export.evaluation.generation import greedy
from mod_export.evaluation.open import open_reader
from mod_export.evaluation.scoring import likelihoods
from mod_export.evaluation.tasks import Choices
from mod_export.formats.kv_types import KVTypes

NAME = "mod-export"
ANSWER_TOKENS = 256  # of tasks that set no limit, as in `hf`
# The texts, None for parts of one; tokens that are given; tokens that are scored.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A model as the harness asks it.

    pretrained: an adapter, a MoD directory, a plain one, or a GGUF file. device: of a model in
    torch. cache_types: of K and V of a GGUF file, such as q8_0/q4_0. max_length: of a sequence in
    tokens, by default what the model was made for. dtype, mod, base: as open.open_pair takes them.
    The harness hands batch_size and max_batch_size to every class; one sequence is read at a time
    here.

    Raises UserError for a model that cannot be opened.
    """

    def __init__(
        self,
        pretrained: str,
        threshold_shift: float = 0.0,
        threads: int | None = None,
        gpu_layers: int = 0,
        device: str | None = None,
        cache_types: str | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        mod: str | None = None,
        base: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ):
        super().__init__()
        types = KVTypes.parse(cache_types) if cache_types else None
        self.reader = open_reader(
            pretrained,
            threshold_shift,
            threads,
            device or "cpu",
            gpu_layers,
            types,
            dtype,
            mod,
            base,
        )
        self.tokenizer = self.reader.tokenizer
        self.max_length = min(max_length or self.reader.n_ctx, self.reader.n_ctx)
        self._begin = bos(self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing comes before."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None or first < 0 else first

    @property
    def tokenizer_name(self) -> str:
        """Name that the harness keeps prompts under."""
        return self.reader.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs
    ) -> list[int]:
        """Return the tokens of a text, with the model's own beginning unless the text has it."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        return self._begin + ids if add_special_tokens else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages in the model's chat format."""
        if not add_generation_prompt:
            raise UserError(
                "an answer that is begun cannot be put into the chat format",
                "leave out --apply_chat_template, or the beginnings of answers",
            )
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=True
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_kwargs
    ) -> list[tuple[float, bool]]:
        results = []
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        # The choices of an item follow each other, and share the tokens that are given.
        for _, group in groupby(requests, key=lambda request: request[1]):
            choices = self._choices(list(group))
            self.reader.reserve(max(map(len, choices.ids)))
            found = likelihoods(self.reader, choices)
            for (texts, *_), answer in zip(requests[len(results) :], found, strict=False):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            results += found
            bar.update(len(found))
        bar.close()
        return results

    def _choices(self, requests: list[Pair]) -> Choices:
        """The end of each text that fits the model; its last token is scored and not read."""
        ids = [(given + scored)[-self.max_length - 1 :] for _, given, scored in requests]
        n_given = [
            len(all_) - len(scored) for all_, (*_, scored) in zip(ids, requests, strict=True)
        ]
        for all_, n, (texts, *_) in zip(ids, n_given, requests, strict=True):
            if not 0 < n < len(all_):
                what = "no tokens" if n == len(all_) else f"more than {self.max_length} tokens"
                raise UserError(f"a text to score has {what}: {texts}", "leave the item out")
        return Choices(ids, n_given)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log likelihood of each whole text, in parts where it is long."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            parts = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [(None, *make_disjoint_window(part)) for part in parts]
            found = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            totals.append(sum(likelihood for likelihood, _ in found))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the likeliest text after each prompt, up to one of its ends."""
        answers = []
        for prompt, options in tqdm([request.args for request in requests], disable=disable_tqdm):
            options = normalize_gen_kwargs(options, ANSWER_TOKENS)
            if options["do_sample"]:
                raise UserError(
                    "answers are the likeliest tokens here, and the task draws them",
                    "add --gen_kwargs do_sample=False",
                )
            ends = [end for end in options["until"] if end]
            n_tokens = min(options["max_gen_toks"], self.max_length - 1)
            ids = self.tok_encode(prompt)[-(self.max_length - n_tokens) :]
            self.reader.reserve(len(ids) + n_tokens)
            self.reader.reset()
            row = self.reader.last(ids)
            text = greedy(self.reader, row, n_tokens, lambda text, ends=ends: _holds(text, ends))
            answers.append(postprocess_generated_text(text, ends, None))
            self.cache_hook.add_partial("generate_until", (prompt, options), answers[-1])
        return answers


def _holds(text: str, ends: list[str]) -> bool:
    return any(end in text for end in ends)


def run(arguments: Sequence[str], pretrained: str, device: str = "cpu", **options) -> None:
    """Run the harness's command line on a model, with further arguments of HarnessModel.

    Raises UserError for what HarnessModel refuses, and SystemExit for what the harness refuses.
    """
    from lm_eval.__main__ import cli_evaluate

    given = {"pretrained": pretrained} | {
        name: value for name, value in options.items() if value not in (None, 0, 0.0)
    }
    words = ["run", "--model", NAME, "--model_args", json.dumps(given), "--device", device]
    before = sys.argv
    sys.argv = ["lm-eval", *words, *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
