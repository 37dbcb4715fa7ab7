"""OpenAI's client meets the same on a MoD file as with stock llama-server on the dense one."""

import json
import tarfile

import openai
import pytest

from mod_export.llamacpp import source as llama_source
from tests.support.llama_server import started

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
QUESTION = [SYSTEM, {"role": "user", "content": "What is the capital of France?"}]
SETTINGS = {"model": "any", "temperature": 0, "max_tokens": 16}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


# SmolLM2's own template has no tools. This one is among llama.cpp's own.
TEMPLATE = "vendor/llama.cpp/models/templates/Qwen-Qwen2.5-7B-Instruct.jinja"


@pytest.fixture(scope="module")
def servers(shipped, dense, stock_tools, tmp_path_factory):
    """The patched server with a MoD file, and the stock one with the dense file."""
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    with tarfile.open(llama_source.fetch_sdist()) as archive:
        [name] = [name for name in archive.getnames() if name.endswith(TEMPLATE)]
        template.write_bytes(archive.extractfile(name).read())
    options = ("--ctx-size", "2048", "--alias", "small")
    more = ("-np", "4", "--embeddings", "--pooling", "mean", "--chat-template-file", template)
    with (
        started(shipped, *options, more=more) as ours,
        started(dense, *options, more=(*more, "--kv-unified"), tools=stock_tools) as stock,
    ):
        yield {"MoD": ours, "stock": stock}


@pytest.fixture(params=["MoD", "stock"])
def client(request, servers):
    return servers[request.param].client()


def chat(client, **changes):
    return client.chat.completions.create(**SETTINGS | {"messages": QUESTION} | changes)


def test_chat_and_stream(client):
    whole = chat(client)
    said = whole.choices[0].message.content
    assert len(said) > 5 and whole.model == "small"
    assert whole.usage.completion_tokens <= 16 and whole.usage.prompt_tokens > 10
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 5
    text = client.completions.create(model="any", prompt="One, two, three,", max_tokens=4)
    assert text.choices[0].text


def test_several_choices_stop_strings_and_seeds(client):
    both = chat(client, n=2, temperature=1.2, seed=1).choices
    assert [choice.index for choice in both] == [0, 1]
    assert all(choice.message.content for choice in both)
    again = chat(client, n=2, temperature=1.2, seed=1).choices
    assert [c.message.content for c in again] == [c.message.content for c in both]
    word = chat(client).choices[0].message.content.split()[2]
    stopped = chat(client, stop=[word]).choices[0]
    assert word not in stopped.message.content and stopped.finish_reason == "stop"


def test_a_json_schema_holds(client):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    answer = chat(client, response_format=form, max_tokens=100).choices[0].message.content
    found = json.loads(answer)
    assert set(found) == {"city", "people"} and isinstance(found["people"], int)


def weather(city: str) -> list[dict]:
    """A question and the call that answers it: so small a model needs examples."""
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    call = {"id": city, "type": "function", "function": function}
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": city, "content": "sunny"},
    ]


def test_tools_are_called(client):
    cities = ("Rome", "Oslo", "Madrid", "Berlin", "Vienna", "Lisbon", "Dublin")
    messages = [message for city in cities for message in weather(city)] + weather("Paris")[:1]
    asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    choice = chat(client, messages=messages, **asked).choices[0]
    [call] = choice.message.tool_calls
    assert call.function.name == "weather"
    city = json.loads(call.function.arguments)
    assert city.keys() == {"city"}
    assert choice.finish_reason == "tool_calls"
    pieces = [
        piece
        for chunk in chat(client, messages=messages, stream=True, **asked)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    said = "".join(piece.function.arguments or "" for piece in pieces)
    assert json.loads(said) == city


def test_logprobs(client):
    [choice] = chat(client, logprobs=True, top_logprobs=3, max_tokens=4).choices
    assert len(choice.logprobs.content) == 4
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs), abs=1e-4)


def test_embeddings(client):
    made = client.embeddings.create(model="any", input=["a red apple", "a red apple", "war"])
    first, again, other = (item.embedding for item in made.data)
    assert len(first) == 576
    assert product(first, again) == pytest.approx(1, abs=1e-3)
    assert product(first, other) < 0.99


def product(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_errors_are_openais(client):
    with pytest.raises(openai.BadRequestError, match="400"):
        chat(client, messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(openai.BadRequestError):
        chat(client, response_format={"type": "poem"})
    with pytest.raises(openai.BadRequestError):
        chat(client, messages="hello")
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    assert [model.id for model in client.models.list()] == ["small"]


def test_answers_have_the_fields_of_the_stock_server(servers):
    """Beside them there is `mod`, and nothing is missing."""
    text = {"prompt": "One, two,", "max_tokens": 3, "temperature": 0, "logprobs": 2}
    talk = {"messages": QUESTION, "max_tokens": 3, "temperature": 0}
    asked = {
        "/v1/completions": text,
        "/completion": text | {"n_probs": 2},
        "/v1/chat/completions": talk | {"logprobs": True, "top_logprobs": 2},
        "/v1/messages": talk | {"messages": QUESTION[1:]},
        "/v1/embeddings": {"input": "a red apple"},
        "/tokenize": {"content": "a red apple", "with_pieces": True},
        "/apply-template": {"messages": QUESTION},
        "/props": None,
        "/slots": None,
        "/v1/models": None,
    }
    for path, body in asked.items():
        ours, stock = (fields(servers[name].post(path, body)) for name in ("MoD", "stock"))
        more = {name for name in ours if "mod" not in name.split(".")}
        assert more == stock, (path, more ^ stock)
    for path, body in (("/v1/completions", text), ("/v1/chat/completions", talk)):
        ours, stock = (
            set.union(*map(fields, servers[name].stream(path, body))) for name in ("MoD", "stock")
        )
        assert {name for name in ours if "mod" not in name.split(".")} == stock


def fields(answer, path: str = "") -> set[str]:
    """The paths of all fields, whatever the index in a list."""
    if isinstance(answer, list):
        return set().union(*(fields(item, path) for item in answer))
    if not isinstance(answer, dict):
        return {path}
    return set().union({path}, *(fields(item, f"{path}.{key}") for key, item in answer.items()))
