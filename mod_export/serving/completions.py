"""OpenAI's completions without HTTP: requests, answers piece by piece, and the bodies of both.

    ask = parse({"messages": [{"role": "user", "content": "Hello"}]}, llm, chat=True)
    answer = Answer(llm, ask)
    text = "".join(answer)              # then answer.tokens and answer.reason

Everything is checked before the model sees it: llama.cpp trusts its caller.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama, StoppedError
from mod_export.runtime.sampling import ANY_SEED, RANGES, Sampling
from mod_export.runtime.templates import ChatTemplate

# Fields that would change the answer and are not supported, with the values that change nothing.
UNSUPPORTED = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "audio": (),
}
TOKEN_BYTES = 128  # bytes of a token, at most, where many tokens follow one another


class TooLongError(UserError):
    """The prompt does not fit the context."""


@dataclass(frozen=True)
class Ask:
    """A request that can be answered.

    max_tokens: None means until the context is full. usage: a stream's last chunk has the counts.
    """

    chat: bool
    tokens: list[int]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    json: bool = False
    bias: dict[int, float] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)


def parse(body: dict, llm: MoDLlama, chat: bool) -> Ask:
    """What a request's body asks for.

    Raises UserError naming the field that is wrong, and TooLongError where the prompt fills the
    context.
    """
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise UserError(f"{name} is not supported")
    try:
        tokens = _chat_tokens(body, llm) if chat else _text_tokens(body, llm)
    except UnicodeEncodeError as exc:
        raise UserError("the text is no valid Unicode") from exc
    if len(tokens) >= llm.n_ctx():
        raise TooLongError(
            f"the prompt of {len(tokens)} tokens exceeds the context of {llm.n_ctx()}"
        )
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > 16
        or not all(isinstance(s, str) and s for s in stop)
    ):
        raise UserError("stop is a string, or up to 16 of them")
    return Ask(
        chat,
        tokens,
        _max_tokens(body),
        tuple(stop),
        _flag(body, "stream"),
        _flag(_object(body, "stream_options"), "include_usage"),
        _json(body),
        _bias(body, llm),
        _sampling(body, llm),
    )


def _max_tokens(body: dict) -> int | None:
    """The least of both limits; -1 is no limit, as for llama-server."""
    names = ("max_tokens", "max_completion_tokens")
    limits = [_number(body, n, 1, 1 << 30, None, True) for n in names if body.get(n) != -1]
    return min((limit for limit in limits if limit), default=None)


def _sampling(body: dict, llm: MoDLlama) -> Sampling:
    own = Sampling.of(llm)
    values = {
        name: _number(body, name, least, most, getattr(own, name), whole=name == "top_k")
        for name, (least, most) in RANGES.items()
    }
    return Sampling(**values, seed=_number(body, "seed", -(1 << 63), 1 << 64, ANY_SEED, whole=True))


def _chat_tokens(body: dict, llm: MoDLlama) -> list[int]:
    messages = body.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) for m in messages)
    ):
        raise UserError("messages is a list of objects with role and content")
    text = ChatTemplate.of(llm).render([_message(m) for m in messages])
    return _tokenize(text, llm, add_bos=False)


def _message(message: dict) -> dict:
    """The message with plain text as its content.

    Few templates take no content, or the list of parts that OpenAI's clients write.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise UserError(f"role {role!r} is unknown", "use system, user or assistant")
    if isinstance(content, list):
        if not all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
            for p in content
        ):
            raise UserError("the model reads text only: parts of a message have type text")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise UserError("content is a string, or a list of text parts")
    return {**message, "role": "system" if role == "developer" else role, "content": content or ""}


def _text_tokens(body: dict, llm: MoDLlama) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise UserError("prompt is a string that is not empty, one in a request")
    return _tokenize(prompt, llm)


def _tokenize(text: str, llm: MoDLlama, **options) -> list[int]:
    data = text.encode()
    # Tokenising megabytes takes seconds, in which all other requests wait.
    if len(data) > TOKEN_BYTES * llm.n_ctx():
        raise TooLongError(
            f"the prompt of {len(data)} bytes exceeds the context of {llm.n_ctx()} tokens"
        )
    return llm.tokenize(data, special=True, **options)


def _number(body: dict, name: str, least: float, most: float, default, whole: bool = False):
    value = body.get(name)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int if whole else int | float)
        or not least <= value <= most
    ):
        raise UserError(f"{name} is a{' whole' if whole else ''} number from {least:g} to {most:g}")
    return value


def _flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise UserError(f"{name} is true or false")
    return bool(value)


def _object(body: dict, name: str) -> dict:
    value = body.get(name)
    if not isinstance(value, dict | None):
        raise UserError(f"{name} is an object")
    return value or {}


def _json(body: dict) -> bool:
    kind = _object(body, "response_format").get("type", "text")
    if kind not in ("text", "json_object"):
        raise UserError(f"response_format {kind!r} is not supported", "use text or json_object")
    return kind == "json_object"


def _bias(body: dict, llm: MoDLlama) -> dict[int, float]:
    found = {}
    for token, value in _object(body, "logit_bias").items():
        if not token.isdecimal() or len(token) > 9 or not int(token) < llm.n_vocab():
            raise UserError(
                f"logit_bias has tokens from 0 to {llm.n_vocab() - 1}, not {token[:20]!r}"
            )
        found[int(token)] = _number({"logit_bias": value}, "logit_bias", -100, 100, 0.0)
    return found


class Answer:
    """The pieces of an answer.

    tokens: how many came so far. reason: why the answer ended, `stop` or `length`. Iterating raises
    StoppedError where `llm.stop` was set meanwhile. One answer is written at a time.
    """

    def __init__(self, llm: MoDLlama, ask: Ask):
        self.llm, self.ask, self.tokens, self.reason = llm, ask, 0, "stop"

    def __iter__(self) -> Iterator[str]:
        utf8, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for token in self._generate():
            if self.llm.stop:
                raise StoppedError
            if self.llm.is_end(token):
                break
            self.tokens += 1
            text, held, ended = cut(held + utf8.decode(self.llm.piece(token)), self.ask.stop)
            if text:
                yield text
            if ended:
                return
            if self.tokens == self.ask.max_tokens or self.llm.n_tokens >= self.llm.n_ctx():
                self.reason = "length"
                break
        if held := held + utf8.decode(b"", final=True):
            yield held

    def _generate(self) -> Iterator[int]:
        from llama_cpp import LogitsProcessorList
        from llama_cpp.llama_grammar import JSON_GBNF, LlamaGrammar

        def biased(_ids, logits):
            for token, value in self.ask.bias.items():
                logits[token] += value
            return logits

        grammar = LlamaGrammar.from_string(JSON_GBNF, verbose=False) if self.ask.json else None
        return self.ask.sampling.generate(
            self.llm,
            self.ask.tokens,
            grammar=grammar,
            logits_processor=LogitsProcessorList([biased]) if self.ask.bias else None,
        )

    @property
    def usage(self) -> dict:
        read = len(self.ask.tokens)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
        }


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """Split a text at a stop string.

    Returns the text that can be sent, the text that may be the beginning of a stop string and has
    to wait, and whether a whole stop string was found.
    """
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if ends:
        return text[: min(ends)], "", True
    for n in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(len(stop) > n and text.endswith(stop[:n]) for stop in stops):
            return text[:-n], text[-n:], False
    return text, "", False


class Bodies:
    """The bodies of one answer, in the form of /v1/chat/completions or /v1/completions."""

    def __init__(self, name: str, chat: bool):
        self.chat = chat
        self.common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, text: str, answer: Answer) -> dict:
        what = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **what, "logprobs": None, "finish_reason": answer.reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.common, "object": kind, "choices": [choice], "usage": answer.usage}

    def chunk(self, text: str = "", reason: str | None = None) -> dict:
        """A piece of a stream: the beginning with a chat's role, a text, or the end."""
        if text:
            delta = {"content": text}
        else:
            delta = {} if reason else {"role": "assistant", "content": ""}
        what = {"delta": delta} if self.chat else {"text": text}
        return self._stream([{"index": 0, **what, "logprobs": None, "finish_reason": reason}])

    def counts(self, answer: Answer) -> dict:
        """The last chunk, where the request asks for it."""
        return self._stream([]) | {"usage": answer.usage}

    def _stream(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.common, "object": kind, "choices": choices}
