"""The HTTP application behind `mod-export serve`: the routes of llama_cpp.server, with a MoDLlama that answers.

Needs the packages of `mod_export[serve]`. Where it differs from llama_cpp.server's own application:

* an error of the client is answered with 400 and one line, not with 500 and a traceback;
* a message's content may be a list of text parts, as OpenAI's clients write it, for any chat template;
* a new request waits for the one before, instead of cutting its answer off;
* web pages of other origins may not use it, and no environment variable changes it;
* `GET /extras/mod` tells what the routers did.
"""

import sys
from collections.abc import Iterator

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from jinja2 import TemplateError
from llama_cpp import llama_chat_format
from llama_cpp.server import app as upstream
from llama_cpp.server.settings import ServerSettings

from mod_export.errors import UserError
from mod_export.runtime import MoDLlama, Stopped

# what a request can be wrong with; AssertionError and RuntimeError are how llama_cpp refuses two prompts, or embeddings
CLIENT = (UserError, ValueError, TypeError, TemplateError, AssertionError, RuntimeError)


class OneModel:
    """What llama_cpp.server asks for models; this one has a single one, loaded already, under any name."""

    def __init__(self, llm: MoDLlama, name: str):
        self.llm, self.name = llm, name

    def __call__(self, _name: str | None = None) -> MoDLlama:
        return self.llm

    def __iter__(self) -> Iterator[str]:
        return iter([self.name])


class Route(APIRoute):
    """A route whose exceptions become answers of OpenAI's form."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def answer(request: Request):
            try:
                return await handle(request)
            except (HTTPException, RequestValidationError):  # FastAPI's own answers: 401, 422
                raise
            except Stopped:
                return JSONResponse(error("the server is being stopped"), 503)
            except CLIENT as exc:
                return JSONResponse(error(exc), 400)

        return answer


def error(exc: Exception | str) -> dict:
    """The body of an answer that says what is wrong; the server's own log gets the line too."""
    message = " ".join(str(exc).split()) or "it takes one prompt at a time, and no empty one"
    code = "context_length_exceeded" if "context" in message and "exceed" in message else None
    print(f"refused: {message}", file=sys.stderr)
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def make_app(llm: MoDLlama, name: str, api_key: str | None = None) -> FastAPI:
    """The application. name: what `/v1/models` calls the model; api_key: what clients have to send, if any.

    llama_cpp.server keeps its model and settings in its module, so a process has one application at a time.
    """
    upstream.set_server_settings(ServerSettings(api_key=api_key, interrupt_requests=False, root_path=""))
    upstream._llama_proxy = OneModel(llm, name)  # its set_llama_proxy would load the file itself
    llm.chat_handler = chat_handler(llm)
    llm.model_path = name  # what answers call the model: clients need not know the folder
    app = FastAPI(title="mod-export", description="A Mixture-of-Depths model behind OpenAI's API")
    for route in upstream.router.routes:
        app.router.add_api_route(
            route.path, route.endpoint, methods=route.methods, dependencies=route.dependencies, tags=route.tags,
            response_model=route.response_model, responses=route.responses, summary=route.summary,
            include_in_schema=route.include_in_schema, route_class_override=Route)  # fmt: skip

    @app.get("/extras/mod", tags=["Extras"], dependencies=[Depends(upstream.authenticate)])
    async def mod(models: OneModel = Depends(upstream.get_llama_proxy)) -> dict:  # noqa: B008 (as FastAPI has it)
        """What the routers did since the start, and the KV memory of the last conversation."""
        return figures(models())

    return app


def chat_handler(llm: MoDLlama):
    """The model's own chat handler, for messages with text parts too, and with errors of a stream as its last chunk."""
    name = llm.chat_format
    own = llm.chat_handler or llm._chat_handlers.get(name) or llama_chat_format.get_chat_completion_handler(name)

    def handler(*, messages: list[dict], **kwargs):
        answer = own(messages=[plain(message) for message in messages], **kwargs)
        return told(answer) if kwargs.get("stream") else answer

    return handler


def plain(message: dict) -> dict:
    """The message with its text parts joined, since few templates take a list. Raises ValueError for other parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if other := {part["type"] for part in content} - {"text"}:
        raise ValueError(f"this model reads text only, not {', '.join(sorted(other))}")
    return {**message, "content": "\n".join(part["text"] for part in content)}


def told(chunks: Iterator[dict]) -> Iterator[dict]:
    """The chunks; an error comes as one more, because the status of the answer was sent with the first."""
    try:
        yield from chunks
    except (*CLIENT, Stopped) as exc:
        yield error(exc if not isinstance(exc, Stopped) else "the server is being stopped")


def figures(llm: MoDLlama) -> dict:
    """What `GET /extras/mod` answers.

    activation: share of (token, unit) pairs that ran since the start, of each kind too, null before any token; shift of
    the thresholds in logit space; tokens in the context, and bytes of KV: that they use, that memory stands behind,
    and that they would use unrouted.
    """
    kinds = {kind: active / seen if seen else None for kind, (seen, active) in llm.stats_by_kind().items()}
    share, kv = llm.activation(), llm.kv()
    return {"activation": share if share == share else None, "activation_of": kinds, "threshold_shift": llm.shift,
            "tokens": llm.n_tokens, "kv": {"used": kv.used, "committed": kv.committed, "dense": kv.dense}}
