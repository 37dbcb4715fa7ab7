"""The steps of scripts/quickstart after the set-up: export, verify, ask, measure, sum up.

    python scripts/quickstart.py DIR

A step that was done with the same code, model and files is not done again. The stamps of the steps
are in DIR/.stamps.
"""

import hashlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mod_export
from mod_export.cli.output import run_script, show_messages
from mod_export.common.tables import format_table
from mod_export.errors import UserError

QUESTION = "Give three tips for staying healthy."
ADAPTER = (
    "smollm2-kv"  # trained routers; docs/results/training.md compares them with calibrated ones
)
CONTEXT_TOKENS = 1024  # read before the decode that is timed
DECODE_TOKENS = 32
REPEATS = 3
START = time.monotonic()


def say(line: str) -> None:
    """Print a line with the time since the start."""
    print(f"[{time.monotonic() - START:4.0f} s] {line}", flush=True)


def main(directory: Path) -> None:
    """Do all the steps in `directory` and print the summary."""
    directory.mkdir(exist_ok=True)
    show_messages(stdout=True, clock=True)
    make_files(directory)
    parity = {name: check(directory, name) for name in ("mod-f32.gguf", "mod.gguf")}
    say(f"asking: {QUESTION}")
    print(f"\n{answer(directory / 'mod.gguf')}\n", flush=True)
    say(f"measuring speed and KV memory at {CONTEXT_TOKENS} tokens, {REPEATS} times")
    figures = measure({name: directory / f"{name}.gguf" for name in ("dense", "mod")})
    print(f"\n{summary(figures, parity)}")
    print(f"\nTalk to it:  .venv/bin/mod-export chat {directory}/mod.gguf")


def make_files(directory: Path) -> None:
    """Make four GGUF files: the model in two types, and each with the routers added."""
    from mod_export.export import export
    from mod_export.formats import adapter_files, hub

    adapter = adapter_files.resolve(ADAPTER)

    def export_step(name: str, base: Path, **options) -> Path:
        def work() -> None:
            export(adapter, target, base=base, force=True, **options)

        target = directory / name
        step(name, [base], target, work)
        return target

    original = hub.embedded_gguf()
    for name, quant in (("f32", "-f32"), ("q8_0", "")):
        dense = export_step(f"dense{quant}.gguf", original, quant=name, dense=True)
        export_step(f"mod{quant}.gguf", dense)


def step(
    name: str,
    inputs: Sequence[Path],
    output: Path,
    work: Callable[[], None],
    build: str | None = None,
) -> None:
    """Do `work` unless the step's stamp says that it was done.

    The stamp holds for this code, these inputs, this output and this build of the runtime.
    """
    stamp = output.parent / ".stamps" / name
    stamp.parent.mkdir(exist_ok=True)
    if stamp.is_file() and stamp.read_text() == fingerprint([*inputs, output], build):
        say(f"{name}: done before")
        return
    say(f"{name} ...")
    work()
    stamp.write_text(fingerprint([*inputs, output], build))


def fingerprint(paths: Sequence[Path], build: str | None) -> str:
    """Hash of the package's code and assets, the main dependencies' versions, and the paths' files.

    A file of the paths counts with its size and time.
    """
    digest, package = hashlib.sha256(repr(build).encode()), Path(mod_export.__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.glob("assets/**/*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    for name in ("torch", "transformers", "llama-cpp-python"):
        digest.update(importlib.metadata.version(name).encode())
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            facts: tuple = ("missing",)
            if file.is_file():
                facts = (file.stat().st_size, file.stat().st_mtime_ns)
            digest.update(repr((str(file), *facts)).encode())
    return digest.hexdigest()


def check(directory: Path, name: str) -> dict:
    """Result of verify for one file, kept beside the step's stamp.

    Raises UserError where the f32 file does not pass: that file tests the code. A quantised file
    differs by the rounding of its weights, too; the summary shows by how much.
    """
    from mod_export.evaluation.parity import verify
    from mod_export.llamacpp import build as llama_build

    file, kept = directory / name, directory / f"verify-{name}.json"

    def work() -> None:
        kept.write_text(json.dumps(verify(file, ADAPTER), default=float))

    step(f"verify-{name}", [file], kept, work, build=llama_build.installed_build())
    result = json.loads(kept.read_text())
    if not result["passed"] and result["weights"] == "f32":
        raise UserError(
            f"{file} differs from its torch model: {'; '.join(result['failures'])}", f"see {kept}"
        )
    return result


def answer(file: Path) -> str:
    """What the model answers to QUESTION with the likeliest tokens."""
    from mod_export.runtime.llama import MoDLlama
    from mod_export.runtime.sampling import Sampling
    from mod_export.serving.chat import Chat

    likeliest = Sampling(temperature=0, repeat_penalty=1.1)
    chat = Chat(
        MoDLlama(file, n_ctx=2048), sampling=likeliest, max_tokens=100, notice=lambda line: None
    )
    return "".join(chat.ask(QUESTION)).strip()


def measure(files: dict[str, Path]) -> dict[str, dict]:
    """Measure prefill and decode in tokens/s, activation and KV memory of each file.

    The files take turns, and the speeds are medians. KV memory is that after CONTEXT_TOKENS and the
    decode.
    """
    from mod_export.data.text import default_texts
    from mod_export.runtime.llama import MoDLlama

    models = {
        name: MoDLlama(path, n_ctx=CONTEXT_TOKENS + DECODE_TOKENS) for name, path in files.items()
    }
    tokens = models["dense"].tokenize(default_texts()[1].encode())[: CONTEXT_TOKENS + DECODE_TOKENS]
    runs: dict[str, list] = {name: [] for name in models}
    for model in models.values():
        run(model, tokens[:128], decode=8)  # warm up
    for _ in range(REPEATS):
        for name, model in models.items():
            model.reset_stats()
            runs[name].append(run(model, tokens, DECODE_TOKENS))
    result = {}
    for name, model in models.items():
        prefill, decode = (statistics.median(times) for times in zip(*runs[name], strict=True))
        result[name] = {
            "prefill": (len(tokens) - DECODE_TOKENS) / prefill,
            "decode": DECODE_TOKENS / decode,
            "kv": model.kv(),
        }
        result[name]["activation"] = {
            kind: active / seen for kind, (seen, active) in model.stats_by_kind().items()
        }
    return result


def run(model, tokens: list[int], decode: int) -> tuple[float, float]:
    """Seconds to read all but the last `decode` tokens, and to decode these one by one."""
    model.reset()
    start = time.perf_counter()
    model.eval(tokens[:-decode])
    middle = time.perf_counter()
    for token in tokens[-decode:]:
        model.eval([token])
    return middle - start, time.perf_counter() - middle


def summary(figures: dict[str, dict], parity: dict[str, dict]) -> str:
    """The table at the end."""
    dense, mod = figures["dense"], figures["mod"]
    rows = [
        [f"activation of {kind} units", "1", f"{share:.3f}", "-"]
        for kind, share in mod["activation"].items()
    ]
    for name in ("used", "committed"):
        bytes_mod, bytes_dense = getattr(mod["kv"], name), mod["kv"].dense
        share = f"{bytes_mod / bytes_dense:.2f}"
        rows.append([f"KV {name}, kB", f"{bytes_dense / 1e3:.0f}", f"{bytes_mod / 1e3:.0f}", share])
    for name in ("prefill", "decode"):
        row = [
            f"{name}, tokens/s",
            f"{dense[name]:.1f}",
            f"{mod[name]:.1f}",
            f"{mod[name] / dense[name]:.2f}",
        ]
        rows.append(row)
    table = format_table([f"at {CONTEXT_TOKENS} tokens, q8_0", "dense", "MoD", "MoD/dense"], rows)
    lines = []
    for name, result in parity.items():
        decisions, top1 = 100 * result["decision_agreement"], 100 * result["top1_agreement"]
        lines.append(
            f"parity with torch, {name}: decisions {decisions:.2f} % the same, "
            f"top-1 {top1:.1f} %, mean KL {result['mean_kl_all']:.1e}"
        )
    return "\n".join([table, "", *lines])


if __name__ == "__main__":
    run_script(lambda: main(Path(sys.argv[1])))
