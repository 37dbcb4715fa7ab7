"""Text that a model writes: on tiny models, whose texts are noise, but the same noise each time."""

import functools
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import GGML_TYPE_F32, LLAMA_FLASH_ATTN_TYPE_DISABLED

from mod_export.common.files import locked
from mod_export.data.packing import open_data
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.generate_data import GenerationOptions, generate, open_model
from mod_export.runtime import bindings
from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from tests.support.byte_tokenizer import TEXT, byte_tokenizer
from tests.support.tiny_gguf import Tiny

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = [
    [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "No."}]
    for i in range(7)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"vocab": True, "n_layer": 3, "n_embd": 64, "n_ff": 64}
    tiny = Tiny(**made, template=TEMPLATE)
    files = {
        "chat": tiny.write(folder / "chat.gguf"),
        "text": Tiny(**made).write(folder / "text.gguf"),
        "no vocab": Tiny(n_layer=1).write(folder / "none.gguf"),
    }
    if bindings.patched():
        tiny.route([1, 2], "kv").route([1], "ffn").place_biases(
            np.random.default_rng(0).integers(0, 96, (1, 200))
        )
        files["mod"] = tiny.write(folder / "mod.gguf")
    return files


@pytest.fixture
def prompts(tmp_path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    system = {"role": "system", "content": "Be brief."}
    chats = [{"messages": [system] * (i == 1) + question} for i, question in enumerate(QUESTIONS)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "text.txt").write_text("\n\n\n".join(TEXT[i * 300 : i * 300 + 250] for i in range(5)))
    return folder


def options(**changes) -> GenerationOptions:
    sampling = {
        k: changes.pop(k) for k in ("temperature", "top_p", "min_p", "seed") if k in changes
    }
    return GenerationOptions(
        **{"max_tokens": 24, "ctx": 256, "parallel": 4, "threads": 1} | changes,
        sampling=Sampling(**{"temperature": 0, "seed": 0} | sampling),
    )


def run(model: Path, out: Path, prompts=(), force=False, **changes) -> list[dict]:
    """The records of a run; `out` is removed, so that another can follow."""
    chosen = options(**changes)
    llm = open_model(model, chosen)
    try:
        generate(
            llm,
            out,
            chosen,
            [prompts] if prompts else (),
            force,
        )
    finally:
        llm.close()
    with (gzip.open if out.suffix == ".gz" else open)(out, "rt") as file:
        records = [json.loads(line) for line in file]
    out.unlink()
    return records


def test_prompts_are_answered_and_continued(models, prompts, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    records = run(models["chat"], tmp_path / "out.jsonl.gz", prompts, prompt_tokens=30)
    assert [r["id"] for r in records] == list(range(12))
    chats, texts = ([r for r in records if kind in r] for kind in ("messages", "text"))
    assert len(chats) == 7 and len(texts) == 5
    for chat in chats:
        assert [m["role"] for m in chat["messages"]][-2:] == ["user", "assistant"]
        assert chat["messages"][-1]["content"] not in ("", "No.")
    assert [m["messages"][0]["content"] for m in chats if len(m["messages"]) == 3] == ["Be brief."]
    starts = {TEXT[i * 300 : i * 300 + 30] for i in range(5)}
    assert {text["text"][:30] for text in texts} == starts
    assert all(30 < len(text["text"]) <= 54 for text in texts)
    assert caplog.messages[-1].startswith(f"12 texts in {tmp_path / 'out.jsonl.gz'}; ")
    assert list(tmp_path.iterdir()) == [prompts]


def test_the_answer_is_the_models(models, prompts, tmp_path):
    """Against llama_cpp.Llama, one sequence at a time."""
    records = run(models["chat"], tmp_path / "out.jsonl", prompts, parallel=3)
    llm = MoDLlama(models["chat"], n_ctx=256, threads=1)
    for record in records:
        if "messages" in record:
            *asked, answer = record["messages"]
            prompt = "".join(f"<{m['role']}>{m['content']}</s>" for m in asked) + "<assistant>"
            expected, text = answer["content"], ""
        else:
            prompt, expected = record["text"][:64], record["text"].strip()
            text = prompt
        tokens = llm.tokenize(prompt.encode(), add_bos=False, special=True)
        for n, token in enumerate(llm.generate(tokens, temp=0)):
            if llm.is_end(token) or n == 24:
                break
            text += llm.piece(token).decode()
        assert text.strip() == expected
    llm.close()


@pytest.mark.parametrize("temperature", [0, 1])
def test_parallel_changes_nothing(temperature, models, prompts, tmp_path, monkeypatch):
    """With K/V of float32, as the rounding of float16 would tip one choice in thousands, on some
    CPUs other ones.
    """
    exact = functools.partialmethod(
        MoDLlama.new_context,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        flash_attn_type=LLAMA_FLASH_ATTN_TYPE_DISABLED,
    )
    monkeypatch.setattr(MoDLlama, "new_context", exact)
    runs = [
        run(
            models["chat"],
            tmp_path / "out.jsonl",
            prompts,
            parallel=n,
            count=20,
            temperature=temperature,
            seed=3,
        )
        for n in (1, 4, 4)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) == 20 and len({json.dumps(r | {"id": 0}) for r in runs[0]}) == (
        20 if temperature else 12
    )


def test_seeds_and_sampling(models, tmp_path):
    def texts(**sampling):
        return [r["text"] for r in run(models["text"], tmp_path / "out.jsonl", count=6, **sampling)]

    plain = texts(temperature=1, top_p=1, seed=1)
    assert len(set(plain)) == 6
    assert plain == texts(temperature=1, top_p=1, seed=1) != texts(temperature=1, top_p=1, seed=2)
    greedy = texts()
    assert len(set(greedy)) == 1
    assert texts(temperature=1, top_p=0.01) == texts(temperature=1, min_p=1.0) == greedy


def test_conversations_are_made_up(models, tmp_path):
    records = run(
        models["chat"], tmp_path / "out.jsonl", count=8, temperature=1.5, top_p=1, max_tokens=80
    )
    assert len(records) == 8
    assert all([m["role"] for m in r["messages"]] == ["user", "assistant"] for r in records)
    assert all(m["content"].strip() for r in records for m in r["messages"])
    assert len({r["messages"][0]["content"] for r in records}) == 8
    assert [r["id"] for r in records] != list(range(8))  # questions without end are left out


@pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
def test_a_mod_file_writes_as_the_dense_model(models, prompts, tmp_path):
    assert run(models["mod"], tmp_path / "a.jsonl", prompts) == run(
        models["chat"], tmp_path / "b.jsonl", prompts
    )


def test_the_output_is_training_data(models, prompts, tmp_path):
    chosen = options()
    llm = open_model(models["chat"], chosen)
    generate(llm, tmp_path / "out.jsonl.gz", chosen, [prompts])
    llm.close()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = open_data(
        tokenizer, [tmp_path / "out.jsonl.gz"], 64, "answers", cache=tmp_path / "cache"
    )
    ids, marks, _ = data.source.read(0, data.source.count)
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as file:
        answers = [r["messages"][-1]["content"] for r in map(json.loads, file) if "messages" in r]
    assert all(answer in tokenizer.decode(ids[marks]) for answer in answers)


def trained_again(model: Path, folder: Path) -> Path:
    """A model of the same name, size and shape with other weights."""
    data = bytearray(model.read_bytes())
    weights = GGUFFile.open(model).tensors["blk.0.ffn_down.weight"]
    middle = weights.start + weights.nbytes // 8 * 4
    data[middle : middle + 4] = np.float32(0.123).tobytes()
    (folder / "again").mkdir()
    (folder / "again" / model.name).write_bytes(data)
    return folder / "again" / model.name


def test_a_stopped_run_goes_on(models, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    arguments = [
        models["chat"],
        "-o",
        out,
        "--prompts",
        prompts,
        "--max-tokens",
        24,
        "--ctx",
        256,
        "--temperature",
        0,
        "--threads",
        1,
        "--parallel",
        4,
    ]
    command = [
        sys.executable,
        "-m",
        "mod_export",
        "generate-data",
        *map(str, arguments),
        "--count",
        "1000000",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}
    )
    end = time.monotonic() + 60
    while (
        not (partial.exists() and partial.read_bytes().count(b"\n") > 15) and time.monotonic() < end
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    kept = partial.read_bytes().count(b"\n") - 1
    assert f"{kept} texts are kept in {partial}; the same command goes on" in errors
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl.partial",
        "prompts",
    ]
    with open(partial, "ab") as file:
        file.write(b'{"id": 9999, "mess')  # torn by a lost machine
    with pytest.raises(UserError, match="other options: max_tokens was 24, is 23"):
        run(models["chat"], out, prompts, max_tokens=23)
    with pytest.raises(UserError, match="other options: digest was"):
        run(trained_again(models["chat"], tmp_path), out, prompts)
    busy = pytest.raises(UserError, match="another process is writing .*out.jsonl.partial")
    with locked(partial, busy=lambda: None), busy:
        run(models["chat"], out, prompts, count=kept + 5)
    resumed = run(models["chat"], out, prompts, count=kept + 5)
    assert not partial.exists()
    assert resumed == run(models["chat"], out, prompts, count=kept + 5)


def test_errors(models, prompts, tmp_path, run_cli):
    out = tmp_path / "out.jsonl"
    (tmp_path / "there.jsonl").touch()
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "x" * 300}]})
    )
    for arguments, said in (
        ([models["no vocab"], "-o", out, "--count", 1], "has no tokenizer"),
        ([models["chat"], "-o", out], "--count"),
        ([models["chat"], "-o", tmp_path / "out.txt", "--count", 1], "must end in .jsonl"),
        (
            [models["chat"], "-o", tmp_path / "there.jsonl", "--count", 1],
            "there.jsonl exists already",
        ),
        ([models["chat"], "-o", out, "--prompts", tmp_path / "none"], "none does not exist"),
        (
            [models["chat"], "-o", out, "--count", 1, "--ctx", 64, "--max-tokens", 64],
            "leave no room for a prompt",
        ),
        ([models["text"], "-o", out, "--prompts", prompts], "is a conversation, and"),
        (
            [
                models["chat"],
                "-o",
                out,
                "--prompts",
                tmp_path / "long.jsonl",
                "--ctx",
                256,
                "--max-tokens",
                24,
            ],
            "wrote nothing; use a larger --ctx, or prompts of at most 232 tokens",
        ),
        (
            [
                models["chat"],
                "-o",
                out,
                "--prompts",
                tmp_path / "long.jsonl",
                "--ctx",
                256,
                "--max-tokens",
                24,
                "--count",
                5,
            ],
            "came to nothing; use a larger --ctx",
        ),
        (
            [models["chat"], "-o", out, "--count", 1, "--max-tokens", 1],
            "came to nothing; use more --max-tokens, or give --prompts",
        ),
        ([tmp_path / "none.gguf", "-o", out, "--count", 1], "does not exist"),
    ):
        done = run_cli("generate-data", *arguments)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        ), done.stderr
        assert said in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.jsonl", "prompts", "there.jsonl"]
