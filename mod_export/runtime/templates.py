"""The chat template of a GGUF file.

Example:

    template = ChatTemplate.of(llm)                      # UserError where the file has none
    prompt = template.render([{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from mod_export.errors import UserError, template_error

if TYPE_CHECKING:
    from mod_export.runtime.llama import MoDLlama

KEY = "tokenizer.chat_template"


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, formatter: Any):
        self._formatter = formatter

    @classmethod
    def of(cls, llm: MoDLlama) -> ChatTemplate:
        """The template of the file. Raises UserError where the file has none."""
        text = llm.metadata.get(KEY)
        if text is None:
            raise UserError(
                f"{llm.model_path} has no chat template",
                "use a model tuned for chat, or continue texts: mod-export chat --raw",
            )
        bos = llm.token_text(llm.token_bos())
        eos = llm.token_text(llm.token_eos())
        return cls(_compiled(text, bos, eos))

    def apply(self, messages: list[dict]) -> str:
        """Render like `render`, but let through whatever exception the template raises."""
        return self._formatter(messages=messages).prompt

    def render(
        self, messages: list[dict], subject: str = "this conversation", where: str = ""
    ) -> str:
        """The conversation as the model reads it, up to where the answer begins.

        Raises UserError where the template refuses the messages. The error names `subject`, and
        `where` the messages come from.
        """
        try:
            return self.apply(messages)
        except Exception as exc:  # a template raises what it likes: "System role not supported"
            raise template_error(exc, subject, where) from exc


class PlainText:
    """What stands in for a template where a model continues texts: one turn after the other."""

    def __init__(self, llm: MoDLlama):
        begins = llm._model.add_bos_token() and llm.token_bos() >= 0
        self._start = llm.token_text(llm.token_bos()) if begins else ""

    def render(self, messages: list[dict]) -> str:
        """The texts of all messages, as the model reads them."""
        return self._start + "".join(message["content"] for message in messages)


def has_template(llm: MoDLlama) -> bool:
    """Whether the file has a chat template."""
    return KEY in llm.metadata


@functools.lru_cache(maxsize=4)
def _compiled(text: str, bos: str, eos: str) -> Any:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template=text, eos_token=eos, bos_token=bos)
