"""Training text that a model writes itself.

It answers questions, continues texts, or makes up conversations. This is for models whose training
data is unknown: a MoD model that is distilled on such text stays close to what the original says.

    options = GenerationOptions(parallel=8, count=1000)
    llm = open_model("dense.gguf", options)
    generate(llm, "out.jsonl.gz", options, prompts=["chat.jsonl.gz"])
"""

from __future__ import annotations

import gzip
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mod_export.common.files import atomic_file
from mod_export.common.journal import Journal
from mod_export.common.progress import Progress, stage
from mod_export.data import sources
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import devices
from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from mod_export.runtime.sequences import Job, write
from mod_export.runtime.templates import ChatTemplate, has_template

logger = logging.getLogger(__name__)

# It stands for the user's words where only the text around them is wanted.
USER_MARK = "mod-export-user"
# The fields of Sampling that can be chosen here; the journal's identity has them.
DECIDING_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
MAX_EMPTY_RESULTS = 200  # results in a row that came to nothing


@dataclass(frozen=True)
class GenerationOptions:
    """What is written.

    count: texts to write, None for one for each prompt. max_tokens: of each answer, continuation or
    made-up question. ctx: tokens of a prompt and of the text after it; longer prompts are left out.
    prompt_tokens: tokens of a document's beginning. parallel: sequences at a time.
    """

    count: int | None = None
    max_tokens: int = 512
    ctx: int = 2048
    prompt_tokens: int = 64
    parallel: int = 8
    threads: int | None = None
    gpu_layers: int = 0
    sampling: Sampling = Sampling(seed=0)  # the same texts each time

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt, at most."""
        return self.ctx - self.max_tokens


def open_model(file: str | Path, options: GenerationOptions) -> MoDLlama:
    """The model with a context for `options.parallel` sequences.

    A MoD model runs with every unit active. Raises UserError for a file that does not open, has no
    vocabulary, or where no prompt fits.
    """
    if options.longest_prompt < 2:
        raise UserError(
            f"{options.max_tokens} new tokens leave no room for a prompt in {options.ctx}",
            "use a larger --ctx, or fewer --max-tokens",
        )
    devices.check(options.gpu_layers)
    # This small context gives way to one for several sequences.
    llm = MoDLlama(
        file, n_ctx=256, threads=options.threads, n_batch=256, n_gpu_layers=options.gpu_layers
    )
    llm.require_vocab()
    each = -(-options.ctx // 256) * 256
    # A dense model has a cache for each sequence: no time goes to the masked cells of the others.
    llm.new_context(
        n_ctx=each * options.parallel, n_seq_max=options.parallel, kv_unified=bool(llm.units)
    )
    if llm.units:
        llm.force = "active"
    return llm


def generate(
    llm: MoDLlama,
    out: str | Path,
    options: GenerationOptions,
    prompts: Sequence[str | Path] = (),
    force: bool = False,
) -> int:
    """Write texts to `out` (.jsonl or .jsonl.gz), and return how many there are.

    `out` appears when all are written. prompts: files of conversations, whose first question is
    answered, and of text, whose documents' beginnings are continued. Without prompts the model
    makes up conversations, or texts if it has no chat template. A stopped run goes on where it was
    when it is started again, see common/journal.py. Raises UserError for an output or prompts that
    cannot be used.
    """
    _check(out, options, prompts)
    files = sources.find(prompts) if prompts else []
    with Journal(out, _identity(llm, options, files)) as journal:
        with atomic_file(out, force) as tmp:
            with stage("reading the prompts"):
                pieces = sources.Mixed(files) if files else None
            if pieces is not None and not len(pieces):
                raise UserError(
                    f"there is no text in {', '.join(map(str, prompts))}",
                    "give prompts that have some",
                )
            writer = _Writer(llm, options, pieces)
            try:
                _run(writer, journal)
            except (KeyboardInterrupt, SystemExit):
                if journal.count:
                    logger.info(
                        f"{journal.count} texts are kept in {journal.path}; the same command goes "
                        "on from there"
                    )
                raise
            if not journal.count:
                raise UserError("the model wrote nothing", writer.cure())
            with (gzip.open if str(out).endswith(".gz") else open)(tmp, "wb") as file:
                file.writelines(itertools.islice(journal.lines(), options.count))
        journal.done()
    written = min(journal.count, options.count or journal.count)
    logger.info(
        f"{written} texts in {out}; {writer.cut} cut at {options.max_tokens} tokens, "
        f"{writer.left_out()} left out"
    )
    return written


def _check(out: str | Path, options: GenerationOptions, prompts: Sequence[str | Path]) -> None:
    """Raise UserError for an output of another kind, or where no number of texts is given."""
    if not str(out).endswith((".jsonl", ".jsonl.gz")):
        raise UserError(
            f"{out} must end in .jsonl or .jsonl.gz", "training data are told apart by their names"
        )
    if not prompts and options.count is None:
        raise UserError(
            "it is not said how many texts to make up", "use --count, or give --prompts"
        )


def _identity(llm: MoDLlama, options: GenerationOptions, files: list[Path]) -> dict:
    """All that decides the texts, to tell whether a journal belongs to this run.

    The number of texts is no part of it: more texts may be wanted now. The digest tells a model
    that was trained again from the one before it, which has the same name and size.
    """
    path = Path(llm.model_path)
    deciding = {name: getattr(options, name) for name in ("max_tokens", "ctx", "prompt_tokens")}
    return {
        "model": path.name,
        "bytes": path.stat().st_size,
        "digest": GGUFFile.open(path).digest(),
        "prompts": sources.digest(files),
        **deciding,
        **{name: getattr(options.sampling, name) for name in DECIDING_SAMPLING},
    }


def _run(writer: _Writer, journal: Journal) -> None:
    """Fill the journal in the order of the jobs, whichever of them ends first."""
    options = writer.options
    following = journal.following
    before = journal.count
    total = len(writer.prompts) if options.count is None else options.count
    progress = Progress()
    tokens = 0
    empty = 0  # results in a row that came to nothing
    waiting: dict[int, dict | None] = {}
    jobs = writer.jobs(following)
    done = write(
        writer.llm, jobs, options.parallel, options.max_tokens, options.sampling, following
    )
    # Progress tells how it goes whenever a text ends.
    with stage("writing the first texts"):
        done = itertools.chain([first] if (first := next(done, None)) else [], done)
    while journal.count < total and (ended := next(done, None)):
        number, record, n_tokens = ended
        waiting[number] = record
        tokens += n_tokens
        while following in waiting and journal.count < total:
            record = waiting.pop(following)
            if record is not None:
                journal.add({"id": following} | record)
            empty = 0 if record else empty + 1
            following += 1
        if empty > MAX_EMPTY_RESULTS:
            raise UserError(f"{empty} texts in a row came to nothing", writer.cure())
        note = f"{journal.count} of {total}, {tokens / (progress.seconds or 1):.0f} tokens/s"
        if left_out := writer.dropped.total():
            note += f", {left_out} left out"
        progress.tell("generating", journal.count, total, note, before)
    progress.clear()


# Why a text is left out, and what helps.
TOO_LONG = "with too long a prompt"
UNFINISHED = "with a made-up question that has no end"
EMPTY = "empty"


class _Writer:
    """Jobs for `sequences.write`, one for each text.

    cut: texts that were cut short. dropped: number of texts that were left out, by the reason.
    """

    def __init__(self, llm: MoDLlama, options: GenerationOptions, prompts: sources.Mixed | None):
        self.llm = llm
        self.options = options
        self.prompts = prompts
        self.cut = 0
        self.dropped: Counter[str] = Counter()
        self.template = ChatTemplate.of(llm) if has_template(llm) else None

    def jobs(self, first: int) -> Iterator[Job]:
        """The jobs from number `first` on; where a count is wanted, the prompts repeat."""
        if self.prompts is None:
            make = self._invent if self.template else self._begin
            return (make() for _ in itertools.count(first))
        n = len(self.prompts)
        numbers = range(first, n) if self.options.count is None else itertools.count(first)
        return (self._from(self.prompts[i % n]) for i in numbers)

    def _from(self, piece: sources.Piece) -> Job:
        if piece.messages is not None:
            return self._answer(_question(piece.messages), piece.where)
        # These are more characters than the tokens can have, but not the whole document.
        start = self.llm.tokenize(
            piece.text[: 32 * self.options.prompt_tokens].encode(), add_bos=True
        )
        return self._continue(start[: self.options.prompt_tokens])

    def _answer(self, messages: list[dict], where: str = "a made-up question") -> Job:
        prompt = self._prompt(messages, where) if messages else []
        if not 0 < len(prompt) <= self.options.longest_prompt:
            return self._drop(TOO_LONG if prompt else EMPTY)
        written = yield prompt
        text = self._text(written.tokens).strip()
        self.cut += not written.ended
        return (
            {"messages": [*messages, {"role": "assistant", "content": text}]}
            if text
            else self._drop(EMPTY)
        )

    def _invent(self) -> Job:
        """Give the model the template up to the user's words.

        The model writes these words, as a user would, and then the answer.
        """
        text = self.template.render([{"role": "user", "content": USER_MARK}])
        written = yield self._tokens(text.partition(USER_MARK)[0]) or self._nothing()
        question = self._text(written.tokens).strip()
        if not written.ended or not question:
            return self._drop(EMPTY if written.ended else UNFINISHED)
        return (yield from self._answer([{"role": "user", "content": question}]))

    def _begin(self) -> Job:
        """Let the model write a text from nothing."""
        return (yield from self._continue(self._nothing()))

    def _nothing(self) -> list[int]:
        """The one token that a model needs to begin with."""
        bos, eos = self.llm.token_bos(), self.llm.token_eos()
        return [bos if bos >= 0 else max(eos, 0)]

    def _continue(self, start: list[int]) -> Job:
        if not 0 < len(start) <= self.options.longest_prompt:
            return self._drop(TOO_LONG if start else EMPTY)
        written = yield start
        self.cut += not written.ended
        text = self._text(start + written.tokens)
        return {"text": text} if text.strip() else self._drop(EMPTY)

    def _prompt(self, messages: list[dict], where: str) -> list[int]:
        if self.template is None:
            raise UserError(
                f"{where} is a conversation, and {self.llm.model_path} has no chat template",
                "use text as prompts, or a model tuned for chat",
            )
        return self._tokens(self.template.render(messages, where=where))

    def _tokens(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)

    def _text(self, tokens: list[int]) -> str:
        """The text of tokens, without half a character where it was cut."""
        return b"".join(map(self.llm.piece, tokens)).decode("utf-8", "ignore")

    def _drop(self, why: str) -> None:
        self.dropped[why] += 1

    def left_out(self) -> str:
        """How many texts were left out, and why."""
        reasons = ", ".join(f"{n} {why}" for why, n in self.dropped.items())
        return f"{self.dropped.total()}{f' ({reasons})' if reasons else ''}"

    def cure(self) -> str:
        """What helps where all texts are left out: against the commonest reason."""
        why = self.dropped.most_common(1)[0][0] if self.dropped else EMPTY
        cures = {
            TOO_LONG: f"use a larger --ctx, or prompts of at most {self.options.longest_prompt} "
            "tokens",
            UNFINISHED: "use more --max-tokens, or give --prompts",
            EMPTY: "give other --prompts, or a model that answers them",
        }
        return cures[why]


def _question(messages: list[dict]) -> list[dict]:
    """A conversation up to its first question, with the system prompt; [] where no user speaks."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    return [] if first is None else messages[: first + 1]
