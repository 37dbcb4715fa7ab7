"""How fast is llama-server on a MoD file: several clients, one client, and an edited history?

    python -m scripts.studies.serve_speed dense.gguf mod.gguf --json serve-speed.json

Three ratios, each a median over rounds that alternate the two sides:

* tokens per second of four clients at once to those of the four one after the other;
* tokens per second of one client to those of llama_cpp.Llama on the same file;
* time to the first token of a prompt of 3000 tokens whose last 500 are others than those of the
  prompt before: MoD to dense.

Run it on a quiet machine.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import click
from llama_cpp import Llama

from mod_export.common.system import cpu_name, usable_cpus
from mod_export.common.tables import format_table
from mod_export.data.text import default_texts
from scripts.studies.server_process import ServerProcess

CLIENTS = 4
PROMPT, ANSWER = 128, 128  # tokens of a request
HISTORY, CHANGED = 3000, 500
CONTEXT = 8192
PAUSE = 0.5  # seconds between measurements: threads of the side before stop spinning


def body(tokens: list[int], count: int) -> dict:
    """A request for `count` tokens after these, none of which is known before."""
    return {
        "prompt": tokens,
        "n_predict": count,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }


def timed(call) -> float:
    """Seconds that a call takes."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def asked(server: ServerProcess, request: dict) -> None:
    status, answer = server.ask("/completion", request)
    if status != 200 or answer["tokens_predicted"] != request["n_predict"]:
        raise SystemExit(f"status {status}: {str(answer)[:200]}")


def clients(server: ServerProcess, tokens: list[int], rounds: int) -> dict:
    """Seconds of four requests at once and of the four in a row."""
    requests = [body(tokens[PROMPT * i :][:PROMPT], ANSWER) for i in range(CLIENTS)]
    together, apart = [], []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(rounds):
            together.append(timed(lambda: list(pool.map(lambda r: asked(server, r), requests))))
            apart.append(timed(lambda: [asked(server, r) for r in requests]))
    return {"first": "4 at once", "second": "4 in a row", "seconds": [together, apart]}


def one_client(server: ServerProcess, file: Path, tokens: list[int], rounds: int) -> dict:
    """Seconds of one request to the server and of llama_cpp.Llama."""
    llm = Llama(str(file), n_ctx=CONTEXT, n_threads=usable_cpus(), verbose=False)

    def generate() -> None:
        llm.reset()
        made = llm.generate(tokens[:PROMPT], temp=0.0, repeat_penalty=1.0)
        for _ in range(ANSWER):
            llm.detokenize([next(made)])

    served, direct = [], []
    for _ in range(rounds):
        served.append(timed(lambda: asked(server, body(tokens[:PROMPT], ANSWER))))
        direct.append(timed(generate))
    return {"first": "one client", "second": "llama_cpp.Llama", "seconds": [served, direct]}


def edited(mod: ServerProcess, dense: ServerProcess, tokens: list[int], rounds: int) -> dict:
    """Seconds to the first token after the end of a history has changed."""
    found: list[list[float]] = [[], []]
    for i in range(rounds):
        history = tokens[10 * i :][:HISTORY]  # another one each time
        other = history[:-CHANGED] + tokens[HISTORY + 10 * i :][:CHANGED]
        for times, server in zip(found, (mod, dense), strict=True):
            asked(server, body(history, 1) | {"cache_prompt": True})
            request = body(other, 1) | {"cache_prompt": True}
            times.append(timed(lambda s=server, r=request: asked(s, r)))
    return {"first": "edited, MoD", "second": "edited, dense", "seconds": found}


def measure(dense_file: Path, mod_file: Path, rounds: int) -> list[dict]:
    """The three pairs."""
    mod = ServerProcess(mod_file, CONTEXT, "-np", str(CLIENTS))
    dense = ServerProcess(dense_file, CONTEXT, "-np", str(CLIENTS))
    text = " ".join(default_texts())[:60_000]
    tokens = mod.ask("/tokenize", {"content": text})[1]["tokens"]
    asked(mod, body(tokens[:PROMPT], ANSWER))  # what only a first request does
    asked(dense, body(tokens[:PROMPT], ANSWER))
    pairs = [
        clients(mod, tokens, rounds),
        clients(dense, tokens, rounds),
        one_client(mod, mod_file, tokens, rounds),
        edited(mod, dense, tokens, rounds),
    ]
    for pair, file in zip(pairs, (mod_file, dense_file, mod_file, mod_file), strict=True):
        pair["file"] = file.name
    mod.end()
    dense.end()
    return pairs


@click.command()
@click.argument("dense", type=click.Path(path_type=Path, exists=True))
@click.argument("mod", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the figures.")
def main(dense: Path, mod: Path, rounds: int, out: Path | None) -> None:
    """Measure llama-server on MOD beside DENSE."""
    pairs = measure(dense, mod, rounds)
    rows = []
    for pair in pairs:
        a, b = (median(times) for times in pair["seconds"])
        rows.append([pair["file"], pair["first"], f"{a:.2f}", pair["second"], f"{b:.2f}"])
        each = [x / y for x, y in zip(*pair["seconds"], strict=True)]
        rows[-1] += [f"{median(each):.3f}", f"{min(each):.3f} to {max(each):.3f}"]
    names = ["file", "first", "s", "second", "s", "first / second", "rounds"]
    click.echo(format_table(names, rows))
    if out:
        machine = {"cpu": cpu_name(), "processors": usable_cpus()}
        out.write_text(json.dumps({"pairs": pairs} | machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
