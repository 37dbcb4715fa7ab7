"""Chat with a model in the terminal: `Chat` holds the conversation, `repl` and `answer_once` are
its two faces.

Chat knows nothing of terminals; everything that is no answer goes through its `say` callback.

    chat = Chat(MoDLlama("mod.gguf"), system="Be brief.")
    for text in chat.ask("What is a lighthouse?"):
        print(text, end="", flush=True)
"""

import codecs
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mod_export.common.tables import format_table
from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama, Stopped

HELP = """\
/reset        forget the conversation
/stats        activation of each unit, KV memory, graphs
/threshold X  shift all thresholds by X in logit space from the next token on: above 0 fewer tokens are active,
              0 is the file's own; `/threshold X all` reads the conversation again with it; without X: show it
/help         this text
/quit         leave (also Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = ("/reset", "/stats", "/threshold", "/help", "/quit")


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen; temp 0 takes the likeliest token."""

    temp: float = 0.2
    top_p: float = 0.9
    repeat_penalty: float = 1.1  # of tokens among the last 64: small models loop without
    seed: int = 1
    max_tokens: int = 512


@dataclass
class Turn:
    """What the last answer took."""

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0  # after the first token
    seen: int = 0  # (token, unit) pairs
    active: int = 0


@dataclass
class Chat:
    """A conversation. `ask` streams an answer; the history keeps it, or as much as came before a
    stop.
    """

    llm: MoDLlama
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
    history: list[dict] = field(default_factory=list)
    turn: Turn = field(default_factory=Turn)

    def __post_init__(self):
        self._format = formatter(self.llm)
        self.llm.set_seed(self.sampling.seed)

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer's pieces. Raises UserError where the question is empty or alone too
        long.
        """
        if not text:
            raise UserError("the prompt is empty", "give it some text")
        self.history.append({"role": "user", "content": text})
        try:
            tokens = self._fit()
        except UserError:
            self.history.pop()
            raise
        answer = []
        try:
            for piece in self._stream(tokens):
                answer.append(piece)
                yield piece
        finally:
            self.history.append({"role": "assistant", "content": "".join(answer)})

    def reset(self) -> None:
        """Forgets the conversation and the counters; the system prompt and the thresholds stay."""
        self.history.clear()
        self.llm.reset()
        self.llm.eval([])  # frees the KV cells
        self.llm.reset_stats()

    def _fit(self) -> list[int]:
        """The prompt's tokens, after the oldest turns have gone if need be."""
        room = self.llm.n_ctx() - min(self.sampling.max_tokens, self.llm.n_ctx() // 4)
        dropped = 0
        while len(tokens := self._tokens()) > room and len(self.history) > 1:
            del self.history[:2]  # a question and its answer
            dropped += 1
        if len(tokens) >= self.llm.n_ctx():
            raise UserError(
                f"the prompt of {len(tokens)} tokens does not fit a context of {self.llm.n_ctx()}",
                "use a larger --ctx or a shorter prompt",
            )
        if dropped:
            self.say(f"[context full: the oldest {dropped} turn{'s' * (dropped > 1)} forgotten]")
        return tokens

    def _tokens(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.llm.tokenize(
            render(self._format, system + self.history).encode(), add_bos=False, special=True
        )

    def _stream(self, tokens: list[int]) -> Iterator[str]:
        self.turn = Turn(prompt_tokens=len(tokens))
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        before, start = self._counters(), 0.0
        s = self.sampling
        try:
            for token in self.llm.generate(
                tokens, temp=s.temp, top_p=s.top_p, repeat_penalty=s.repeat_penalty
            ):
                start = start or time.perf_counter()
                if self.llm.stop or self.llm.is_end(token):
                    break
                self.turn.tokens += 1
                yield utf8.decode(self.llm.piece(token))
                if self.turn.tokens >= s.max_tokens:
                    self.say(f"\n[stopped after --max-tokens {s.max_tokens}]")
                    break
                if self.llm.n_tokens >= self.llm.n_ctx():
                    self.say("\n[context full: the answer ends here]")
                    break
        except Stopped:
            pass
        if rest := utf8.decode(b"", final=True):
            yield rest
        self.turn.seconds = time.perf_counter() - start if start else 0.0
        self.turn.seen, self.turn.active = (
            a - b for a, b in zip(self._counters(), before, strict=True)
        )

    def _counters(self) -> tuple[int, int]:
        pairs = list(self.llm.stats_by_kind().values())
        return sum(seen for seen, _ in pairs), sum(active for _, active in pairs)

    def status(self) -> str:
        """One line about the last answer and the memory of the conversation."""
        t, kv = self.turn, self.llm.kv()
        parts = [f"{t.tokens} tokens"]
        if t.tokens > 1 and t.seconds > 0:
            parts.append(f"{(t.tokens - 1) / t.seconds:.1f} tokens/s")
        if not self.llm.units:
            return f"[{', '.join(parts)}, dense model, KV {_mb(kv.used)}]"
        if t.seen:
            shift = f" at shift {self.llm.shift:+.3g}" if self.llm.shift else ""
            parts.append(f"activation {t.active / t.seen:.2f}{shift}")
        share = f" ({kv.used / kv.dense:.0%})" if kv.dense else ""
        parts.append(f"KV {_mb(kv.used)} of dense {_mb(kv.dense)}{share}")
        return f"[{', '.join(parts)}]"

    def set_shift(self, text: str) -> None:
        """/threshold: shows the shift, or sets it, for what is read from now on or ("X all") for
        everything.
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
            self.say(
                "the next answer reads the conversation again with it"
                if what
                else "from the next token on"
            )
        ps = llm.thresholds
        self.say(
            f"thresholds p {min(ps):.3g} to {max(ps):.3g}, shifted by {llm.shift:+.3g} in logit space "
            f"(above 0: fewer tokens active)"
        )

    def stats(self) -> str:
        """/stats: tables of units and of memory."""
        kv, perf = self.llm.kv(), self.llm.perf()
        lines = []
        if self.llm.units:
            rows = [
                [
                    s.unit.layer,
                    s.unit.kind,
                    round(p, 4),
                    round(s.unit.activation, 3),
                    round(s.share, 3) if s.seen else None,
                    s.seen,
                ]
                for s, p in zip(self.llm.stats(), self.llm.thresholds, strict=True)
            ]
            lines += [
                format_table(["layer", "kind", "p", "calibrated", "active", "tokens"], rows),
                "",
            ]
            lines.append(f"activation {self.llm.activation():.3f} over all units and tokens")
        lines.append(
            f"KV: {kv.cells_used} of {kv.cells} cells; used {_mb(kv.used)}, dense {_mb(kv.dense)}, "
            f"committed {_mb(kv.committed)}, reserved {_mb(kv.reserved)}"
        )
        if perf:
            lines.append(f"graphs: {perf.graphs} computed, {perf.graphs_reused} of them reused")
        return "\n".join(lines)


def _mb(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"


def formatter(llm: MoDLlama):
    """The model's chat template: formatter(llm)(messages=[...]).prompt ends where the answer
    begins.

    Raises UserError where it has none.
    """
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        raise UserError(f"{llm.model_path} has no chat template", "use a model tuned for chat")
    bos, eos = (
        llm._model.token_get_text(t) if t >= 0 else "" for t in (llm.token_bos(), llm.token_eos())
    )
    return _compiled(template, bos, eos)


@functools.lru_cache(maxsize=4)
def _compiled(template: str, bos: str, eos: str):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)


def render(form, messages: list[dict]) -> str:
    """The conversation as the model reads it, by its `formatter`. Raises UserError where the
    template refuses it.
    """
    try:
        return form(messages=messages).prompt
    except Exception as exc:  # whatever the template raises, such as "System role not supported"
        raise UserError(f"the model's chat template refuses this conversation: {exc}") from exc


@contextmanager
def stop_on_interrupt(llm: MoDLlama) -> Iterator[None]:
    """Inside, Ctrl-C stops the answer after the token (or prompt batch) in work; never in the
    middle of a decode.
    """

    def stop(*_):
        llm.stop = True

    llm.stop = False
    former = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def answer_once(chat: Chat, prompt: str) -> bool:
    """One shot: the answer alone on stdout, the status on stderr. False if Ctrl-C stopped it."""
    with stop_on_interrupt(chat.llm):
        for piece in chat.ask(prompt):
            print(piece, end="", flush=True)
    print(flush=True)
    chat.say(chat.status())
    return not chat.llm.stop


def run_lines(chat: Chat, lines: list[str]) -> bool:
    """Turns and commands from a pipe, one a line; False if one of them failed."""
    fine = True
    for line in filter(None, map(str.strip, lines)):
        try:
            if not _turn(chat, line):
                break
        except UserError as exc:
            chat.say(f"error: {exc}")
            fine = False
    return fine


def welcome(llm: MoDLlama) -> str:
    """The first line of a chat: what is routed, and the context."""
    kinds = ", ".join(f"{sum(u.kind == kind for u in llm.units)} {kind}" for kind in llm.kinds)
    trained = llm._model.n_ctx_train()
    beyond = (
        f" (beyond the {trained} that the model was trained for)" if llm.n_ctx() > trained else ""
    )
    what = f"routed units: {kinds}" if kinds else "dense model"
    return f"{llm.model_path}: {what}; context {llm.n_ctx()}{beyond}; /help lists the commands"


def repl(chat: Chat) -> None:
    """Turns and commands from the terminal until /quit or Ctrl-D."""
    try:
        import readline  # noqa: F401  (editing and history in input())
    except ImportError:
        pass
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D to leave)")
            continue
        try:
            if line and not _turn(chat, line):
                return
        except UserError as exc:
            chat.say(f"error: {exc}")


def _turn(chat: Chat, line: str) -> bool:
    """One question or command; False to leave."""
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        chat.reset()
        chat.say("conversation forgotten")
    elif name == "/stats":
        chat.say(chat.stats())
    elif name == "/threshold":
        chat.set_shift(argument.strip())
    elif name == "/help":
        chat.say(HELP)
    elif name.startswith("/"):
        chat.say(f"unknown command {name}; one of {', '.join(COMMANDS)}")
    else:
        answer_once(chat, line)
    return True


def is_script(text: str) -> bool:
    """Whether piped text is a script of turns: one of its lines is a command."""
    return any(line.split(" ")[0] in COMMANDS for line in text.splitlines())
