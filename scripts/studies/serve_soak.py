"""Does llama-server stay up, right and within its memory under eight clients of different kinds?

    python -m scripts.studies.serve_soak f32.gguf --minutes 30 --json soak.json -- -ctk f32 -ctv f32

Clients: chats, streams, streams that are abandoned, edited histories, JSON schemas, embeddings,
slots that are saved and restored, and wrong requests. Answers of temperature 0 are compared with
those of a fresh process to the same prompt; they may part where two tokens are as likely. Weights
or K/V of fewer bits than f32 round otherwise where a batch has other requests in it, with a dense
model as well, so that answers part more often.
LLAMA_CPP_LIB_PATH names the folder of another llama-server, such as one with a sanitizer. The exit
code is 1 where the server ended, where a request got a status that it should not get, or where an
answer differs.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from mod_export.data.text import default_texts
from scripts.studies.server_process import ServerProcess

SLOTS = 8
CONTEXT = 16384  # of all slots together
CACHE_MIB = 256
TOKENS = 16
TIE = 0.2  # Log-probabilities so close may change places by rounding.
PROMPTS = 12  # whose answers are known
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
WRONG = (
    ("/v1/chat/completions", {"messages": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    ("/v1/completions", {"prompt": [999_999_999]}),
    ("/v1/completions", {"prompt": "x", "threshold_shift": "high"}),
    ("/v1/completions", {"prompt": "x", "grammar": "root ::= ("}),
    ("/v1/completions", {}),
    ("/v1/completions", {"prompt": "word " * 20_000}),
    ("/slots/0?action=restore", {"filename": "../none"}),
    ("/nothing", {}),
)


@dataclass
class Soak:
    """What is shared by the clients, and what they found."""

    server: ServerProcess
    prompts: list[str]
    answers: dict[str, dict]
    until: float
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    parted: int = 0  # answers of other tokens than the fresh process had
    differing: int = 0  # those of them that did not part at a tie

    def fault(self, what: str) -> None:
        """Note what should not have happened."""
        self.faults.append(what)

    def done(self, what: str, status: int, wanted: range = range(200, 201)) -> bool:
        """Count an answer; whether its status is one that it should have."""
        self.counts[what] += 1
        if status not in wanted:
            self.fault(f"{what}: status {status}")
        return status in wanted


def completion(prompt, **changes) -> dict:
    return {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 4} | changes


def same_answer(a: dict, b: dict) -> bool:
    """Whether two answers say the same tokens, or part where two tokens were as likely.

    Rounding depends on what else is in a batch. Both were asked for with n_probs; tokens that a
    draft model wrote have no likelihoods.
    """
    for x, y in zip(a["completion_probabilities"], b["completion_probabilities"], strict=False):
        if x["id"] != y["id"]:
            known = [one for one in (x, y) if one["top_logprobs"]]
            return bool(known) and all(_gap(one, x["id"], y["id"]) < TIE for one in known)
    return True


def _gap(token: dict, a: int, b: int) -> float:
    found = {other["id"]: other["logprob"] for other in token["top_logprobs"]}
    return abs(found[a] - found[b]) if {a, b} <= found.keys() else float("inf")


def chat(soak: Soak, rng: random.Random) -> None:
    prompt = rng.choice(soak.prompts)
    status, answer = soak.server.ask("/completion", completion(prompt))
    if soak.done("chat", status):
        right = soak.answers[prompt]
        soak.parted += answer["content"] != right["content"]
        soak.differing += not same_answer(answer, right)


def stream(soak: Soak, rng: random.Random) -> None:
    body = {"messages": [{"role": "user", "content": rng.choice(soak.prompts)}]}
    answer = soak.server.request(
        "/v1/chat/completions", body | {"max_tokens": 30, "stream": True, "timings_per_token": True}
    )
    text = answer.read()
    if soak.done("stream", answer.status) and not text.endswith(b"data: [DONE]\n\n"):
        soak.fault("stream: no end")


def abandon(soak: Soak, rng: random.Random) -> None:
    body = completion(rng.choice(soak.prompts), n_predict=500, stream=True, ignore_eos=True)
    answer = soak.server.request("/completion", body)
    answer.read(rng.randrange(1, 200))
    answer.close()
    soak.done("abandon", answer.status)


def edit(soak: Soak, rng: random.Random) -> None:
    words = rng.choice(soak.prompts).split()
    cut = rng.randrange(1, len(words))
    prompt = " ".join(words[:cut] + rng.sample(words, min(20, len(words))))
    status, _ = soak.server.ask(
        "/completion", completion(prompt, threshold_shift=rng.choice([0, 1]))
    )
    soak.done("edit", status)


def schema(soak: Soak, rng: random.Random) -> None:
    body = completion(rng.choice(soak.prompts), n_predict=80, json_schema=SCHEMA)
    status, answer = soak.server.ask("/completion", body)
    if soak.done("schema", status) and answer["stop_type"] != "limit":
        try:
            json.loads(answer["content"])
        except ValueError:
            soak.fault("schema: no JSON")


def embed(soak: Soak, rng: random.Random) -> None:
    body = {"input": rng.sample(soak.prompts, 2)}
    status, answer = soak.server.ask("/v1/embeddings", body)
    if soak.done("embed", status) and len(answer["data"]) != 2:
        soak.fault("embed: not two")


def save(soak: Soak, rng: random.Random) -> None:
    slot, name = rng.randrange(SLOTS), f"slot{rng.randrange(4)}.bin"
    status, _ = soak.server.ask(f"/slots/{slot}?action=save", {"filename": name})
    if soak.done("save", status, range(200, 501)):  # an empty slot is not saved
        status, _ = soak.server.ask(f"/slots/{slot}?action=restore", {"filename": name})
        soak.done("restore", status, range(200, 401))  # nor restored at another shift


def wrong(soak: Soak, rng: random.Random) -> None:
    path, body = rng.choice(WRONG)
    status, _ = soak.server.ask(path, body)
    soak.done("wrong", status, range(400, 502))


CLIENTS = (chat, stream, abandon, edit, schema, embed, save, wrong)


def client(soak: Soak, kind: Callable, seed: int) -> None:
    """Send requests of one kind until the end."""
    rng = random.Random(seed)
    while time.monotonic() < soak.until and soak.server.process.poll() is None:
        try:
            kind(soak, rng)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as exc:
            soak.fault(f"{kind.__name__}: {type(exc).__name__}: {exc}")
            time.sleep(1)


def make_prompts() -> list[str]:
    """Pieces of the packaged texts, of 30 to 250 words; half begin alike."""
    words = " ".join(default_texts()).split()
    starts = [0 if i % 2 else 997 * i for i in range(PROMPTS)]
    lengths = [30 + 20 * i for i in range(PROMPTS)]
    return [" ".join(words[a : a + n]) for a, n in zip(starts, lengths, strict=True)]


def run(file: Path, minutes: float, options: tuple[str, ...]) -> dict:
    """Return what the clients counted, the faults, and resident memory in bytes over time."""
    prompts = make_prompts()
    with tempfile.TemporaryDirectory() as folder:
        more = ["-np", str(SLOTS), "--slot-save-path", folder, "--cache-ram", str(CACHE_MIB)]
        more += ["--embeddings", "--pooling", "mean", "--metrics", *options]
        fresh = ServerProcess(file, CONTEXT, *more)
        asked = [fresh.ask("/completion", completion(p, cache_prompt=False)) for p in prompts]
        fresh.end()
        answers = {p: answer for p, (_, answer) in zip(prompts, asked, strict=True)}
        server = ServerProcess(file, CONTEXT, *more)
        soak = Soak(server, prompts, answers, time.monotonic() + 60 * minutes)
        threads = [
            threading.Thread(target=client, args=(soak, kind, seed))
            for seed, kind in enumerate(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        resident = []
        while any(thread.is_alive() for thread in threads) and server.process.poll() is None:
            resident.append(server.resident())
            time.sleep(5)
        for thread in threads:
            thread.join()
        ended = server.process.poll()
        code = server.end() if ended is None else ended
    return {
        "file": file.name,
        "options": options,
        "minutes": minutes,
        "requests": soak.counts.total(),
        "counts": dict(soak.counts),
        "parted": soak.parted,
        "differing": soak.differing,
        "faults": dict(Counter(soak.faults)),
        "ended_early": ended is not None,
        "exit_code": code,
        "resident": resident,
        "processors": len(os.sched_getaffinity(0)),
    }


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--minutes", type=click.FloatRange(min=0.1), default=30, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the figures.")
def main(file: Path, options: tuple[str, ...], minutes: float, out: Path | None) -> None:
    """Run the clients against a server on FILE, with OPTIONS, and print what they found."""
    found = run(file, minutes, options)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    shown = found | {"resident": [size >> 20 for size in found["resident"][::12] or [0]]}
    click.echo(json.dumps(shown, indent=1))
    bad = found["ended_early"] or found["exit_code"] or found["faults"]
    sys.exit(1 if bad or found["differing"] else 0)


if __name__ == "__main__":
    main()
