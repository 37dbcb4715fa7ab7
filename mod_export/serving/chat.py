"""A conversation with a model: the history, the context, and commands about thresholds.

Chat knows nothing of terminals, see terminal.py. Its callback `notice` gets all that is no answer.

    chat = Chat(MoDLlama("mod.gguf"), system="Be brief.")
    for text in chat.ask("What is a lighthouse?"):
        print(text, end="", flush=True)
"""

import codecs
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mod_export.common.tables import format_table
from mod_export.common.text import short_bytes
from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama, StoppedError
from mod_export.runtime.sampling import Sampling
from mod_export.runtime.templates import ChatTemplate, PlainText
from mod_export.units import UNIT_KINDS


@dataclass
class Turn:
    """What the last answer took.

    seconds: the time after the first token. seen, active: (token, unit) pairs.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    seen: int = 0
    active: int = 0


@dataclass
class Chat:
    """A conversation.

    `ask` streams an answer. The history keeps the answer, or as much of it as came before a stop.

    sampling: by default what the file recommends. max_tokens: of an answer; -1 is no limit. raw:
    the model continues the texts of all turns, without a chat template.
    """

    llm: MoDLlama
    system: str = ""
    sampling: Sampling | None = None
    max_tokens: int = -1
    notice: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
    raw: bool = False
    history: list[dict] = field(default_factory=list)
    turn: Turn = field(default_factory=Turn)

    def __post_init__(self):
        self._template = PlainText(self.llm) if self.raw else ChatTemplate.of(self.llm)
        self._sampling = self.sampling or Sampling.of(self.llm)
        # The last prompt with its answer, as text and as the tokens that were read and written.
        self._text = ""
        self._tokens: list[int] = []
        # The same before each turn, which undo() goes back to.
        self._former: list[tuple[str, list[int]]] = []

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer's pieces.

        Raises UserError where the question is empty, or longer than the context.
        """
        if not text:
            raise UserError("the prompt is empty", "give it some text")
        self.history.append({"role": "user", "content": text})
        try:
            prompt, tokens = self._fit()
        except UserError:
            self.history.pop()
            raise
        answer = []
        self._former.append((self._text, self._tokens))
        self._tokens = list(tokens)
        try:
            for piece in self._stream(tokens):
                answer.append(piece)
                yield piece
        finally:
            self.history.append({"role": "assistant", "content": "".join(answer)})
            self._text = prompt + "".join(answer)

    def undo(self) -> str:
        """Take back the last question with its answer, and return the question.

        What the model has read of them is left at the next question, at the nearest checkpoint.
        Raises UserError where nothing was asked yet.
        """
        if len(self.history) < 2:
            raise UserError("there is no question to take back", "ask one first")
        question, _ = self.history[-2:]
        del self.history[-2:]
        self._text, self._tokens = self._former.pop() if self._former else ("", [])
        return question["content"]

    def ask_again(self) -> Iterator[str]:
        """Yield the pieces of another answer to the last question."""
        return self.ask(self.undo())

    def reset(self) -> None:
        """Forgets the conversation and the counters; the system prompt and the thresholds stay."""
        self.history.clear()
        self._former.clear()
        self._text, self._tokens = "", []
        self.llm.reset()
        self.llm.eval([])  # frees the KV cells
        self.llm.reset_stats()

    def _fit(self) -> tuple[str, list[int]]:
        """The prompt as text and as tokens.

        Where it leaves too little room for the answer, the oldest turns are forgotten until it
        takes half of the context. To drop only what is too much would have every later turn drop
        some more, and read the whole conversation again.
        """
        n_ctx, turns = self.llm.n_ctx(), len(self.history) // 2
        answer = self.max_tokens if self.max_tokens > 0 else n_ctx
        text, tokens = self._prompt(0)
        dropped = 0
        if len(tokens) > n_ctx - min(answer, n_ctx // 4) and turns:
            dropped = bisect_left(
                range(turns), True, 1, key=lambda n: len(self._prompt(n)[1]) <= n_ctx // 2
            )
            text, tokens = self._prompt(dropped)
        if len(tokens) >= n_ctx:
            raise UserError(
                f"the prompt of {len(tokens)} tokens does not fit a context of {n_ctx}",
                "use a larger --ctx or a shorter prompt",
            )
        if dropped:
            del self.history[: 2 * dropped]
            self.notice(f"[context full: the oldest {dropped} of {turns} turns forgotten]")
        return text, tokens

    def _prompt(self, dropped: int) -> tuple[str, list[int]]:
        """The conversation without its oldest turns, as text and as tokens.

        What goes on from the last answer is that turn's own tokens and those of the rest: its text
        alone could be cut into tokens in another way than the model wrote it, and would be read
        again.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = self._template.render(system + self.history[2 * dropped :])
        if self._text and text.startswith(self._text):
            rest = self._tokenize(text[len(self._text) :])
            if rest and self.llm.is_control(rest[0]):  # No token reaches over such a border.
                return text, self._tokens + rest
        return text, self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)

    def _stream(self, tokens: list[int]) -> Iterator[str]:
        self.turn = Turn(prompt_tokens=len(tokens))
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        seen, active = self._counters()
        start = 0.0
        try:
            for token in self._sampling.generate(self.llm, tokens):
                start = start or time.perf_counter()
                if self.llm.stop or self.llm.is_end(token):
                    break
                self.turn.tokens += 1
                self._tokens.append(token)
                yield utf8.decode(self.llm.piece(token))
                if self.turn.tokens == self.max_tokens:
                    self.notice(f"\n[stopped after --max-tokens {self.max_tokens}]")
                    break
                if self.llm.n_tokens >= self.llm.n_ctx():
                    self.notice("\n[context full: the answer ends here]")
                    break
        except StoppedError:
            pass
        if rest := utf8.decode(b"", final=True):
            yield rest
        self.turn.seconds = time.perf_counter() - start if start else 0.0
        seen_now, active_now = self._counters()
        self.turn.seen = seen_now - seen
        self.turn.active = active_now - active

    def _counters(self) -> tuple[int, int]:
        pairs = list(self.llm.stats_by_kind().values())
        return sum(seen for seen, _ in pairs), sum(active for _, active in pairs)

    def status(self) -> str:
        """One line about the last answer and the memory of the conversation."""
        t = self.turn
        parts = [f"{t.tokens} tokens"]
        if t.tokens > 1 and t.seconds > 0:
            parts.append(f"{(t.tokens - 1) / t.seconds:.1f} tokens/s")
        if not self.llm.units:
            return f"[{', '.join(parts)}, dense model, KV {short_bytes(self.llm.kv().used)}]"
        if t.seen:
            shift = f" at shift {self.llm.shift:+.3g}" if self.llm.shift else ""
            parts.append(f"activation {t.active / t.seen:.2f}{shift}")
        return f"[{', '.join([*parts, self._kv_share()])}]"

    def _kv_share(self) -> str:
        """The KV memory against that of dense, and why where it is the same."""
        kv, llm = self.llm.kv(), self.llm
        share = f"{kv.used / kv.dense:.0%}" if kv.dense else "none yet"
        if not any(UNIT_KINDS[kind].frees_kv for kind in llm.kinds):
            share += f", {' and '.join(llm.kinds)} units save none"
        elif kv.used >= kv.dense and llm.n_tokens <= llm.kv_kept:
            share += f", saving begins after {llm.kv_kept} tokens"
        return f"KV {short_bytes(kv.used)} of dense {short_bytes(kv.dense)} ({share})"

    def set_shift(self, text: str) -> None:
        """The command /threshold: show the shift, or set it.

        "X" sets it for what is read from now on, "X all" for the whole conversation.
        """
        llm = self.llm
        if not llm.units:
            raise UserError("a dense model has no thresholds")
        value, _, what = text.partition(" ")
        if value:
            try:
                shift = float(value)
            except ValueError:
                raise UserError(
                    f"{value!r} is not a number", "for example /threshold 0.5"
                ) from None
            if what not in ("", "all"):
                raise UserError(
                    f"{what!r} is unknown", "/threshold X all has the conversation read again"
                )
            llm.set_shift(shift, reread=bool(what))
            if what:
                self.notice("the next answer reads the conversation again with it")
            else:
                self.notice("from the next token on")
        ps = llm.thresholds
        self.notice(
            f"thresholds p {min(ps):.3g} to {max(ps):.3g}, shifted by {llm.shift:+.3g} in logit "
            f"space (above 0: fewer tokens active)"
        )

    def _unit_table(self) -> str:
        """A table with a row for each unit, of single heads where some decide apart."""
        stats = self.llm.stats()
        by_head = any(s.unit.head is not None for s in stats)
        rows = [
            [
                s.unit.layer,
                s.unit.kind,
                *([s.unit.head] if by_head else []),
                round(p, 4),
                round(s.unit.activation, 3),
                round(s.share, 3) if s.seen else None,
                s.seen,
            ]
            for s, p in zip(stats, self.llm.thresholds, strict=True)
        ]
        place = ["layer", "kind", *(["head"] if by_head else [])]
        return format_table([*place, "p", "calibrated", "active", "tokens"], rows)

    def stats(self) -> str:
        """The command /stats: tables of units and of memory."""
        kv, perf = self.llm.kv(), self.llm.perf()
        lines = []
        if self.llm.units:
            lines += [self._unit_table(), ""]
            seen, active = self._counters()
            lines.append(
                f"activation {active / seen:.3f} over all units and tokens"
                if seen
                else "activation: no tokens were read yet"
            )
        memory = self._kv_share() if self.llm.units else f"KV {short_bytes(kv.used)}"
        lines.append(
            f"{memory}; {kv.cells_used} of {kv.cells} cells, committed "
            f"{short_bytes(kv.committed)}, reserved {short_bytes(kv.reserved)}"
        )
        if perf:
            lines.append(f"graphs: {perf.graphs} computed, {perf.graphs_reused} of them reused")
        return "\n".join(lines)
