"""`mod-export eval`: torch and the runtime give the same figures, and these are what they are said
to be.
"""

import json
from dataclasses import replace

import pytest
import torch

from mod_export.data.text import default_texts, pack
from mod_export.evaluation import passkey, perplexity, scoring
from mod_export.evaluation import run as eval_run
from mod_export.evaluation.open import open_pair
from mod_export.evaluation.readers import ROWS, TorchReader, Usage, torch_pair
from mod_export.evaluation.run import EvaluationPlan
from mod_export.evaluation.tasks import encode, read_tasks
from mod_export.export import export
from mod_export.formats.kv_types import KVTypes
from mod_export.runtime import bindings
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny_gguf import Tiny

pytestmark = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)

UNITS = {"kv": [2, 3], "attn": [2, 4], "ffn": [2, 4], "block": [5]}
LENGTH = 300
TEXT = default_texts()[1]
LONG = (
    " and then the keeper went down the stairs" * 12
)  # longer than all that a kv unit keeps of a tail
ITEMS = [
    {
        "task": "piqa",
        "question": "Light the lamp.",
        "choices": ["With a match." + LONG, "With water."],
        "answer": 0,
    },
    {"task": "winogrande", "question": "_ saw Bo, who hid.", "choices": ["Ann", "Cy"], "answer": 1},
    {"task": "mmlu", "subject": "ships", "question": "Port?", "choices": list("abcd"), "answer": 3},
    {"task": "lambada", "question": TEXT[:900], "choices": None, "answer": "lamp oil"},
    {"task": "gsm8k", "question": "2 + 3?", "choices": None, "answer": "5"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """mod/, mod.gguf and dense.gguf (f32) of a tiny random model with SmolLM2's vocabulary;
    tasks.jsonl, text.txt.
    """
    path = tmp_path_factory.mktemp("eval")
    tiny.save_dir(path / "mod", UNITS, ids=pack(tiny.tokenizer(), TEXT, LENGTH, count=2))
    export(path / "mod", path / "dense.gguf", quant="f32", dense=True)
    export(path / "mod", path / "mod.gguf", base=path / "dense.gguf")
    (path / "tasks.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def pairs(folder):
    """The same model in torch and in the runtime."""
    found = {
        "torch": open_pair(folder / "mod"),
        "runtime": open_pair(folder / "mod.gguf", threads=1),
    }
    for pair in found.values():
        pair.reserve(600)
    return found


@pytest.fixture(scope="module")
def items(folder, pairs):
    return [
        encode(pairs["torch"].dense.tokenizer, item)
        for item in read_tasks([folder / "tasks.jsonl"])[0]
    ]


def test_torch_and_the_runtime_give_the_same_figures(folder):
    text, tasks = folder / "text.txt", folder / "tasks.jsonl"
    plan = EvaluationPlan(
        texts=[text],
        length=LENGTH,
        count=2,
        tasks=[tasks],
        haystack=text,
        passkey_lengths=[256],
        passkey_depths=[0.5],
        passkey_trials=1,
        ruler=["niah_single_2", "niah_multikey_3"],
        ruler_lengths=[512],
        ruler_samples=1,
    )
    first, second = (
        eval_run.evaluate(folder / name, plan, threads=1) for name in ("mod", "mod.gguf")
    )
    assert (first["about"]["in"], second["about"]["in"]) == (
        {"dense": "torch", "mod": "torch"},
        {"dense": "runtime", "mod": "runtime"},
    )
    assert first["about"]["skipped_tasks"] == {"gsm8k": 1}
    (a,), (b,) = first["texts"], second["texts"]
    assert 0.2 < a["activation"] < 0.8 and 0.5 < a["kv_share"] < 0.9 and a["kl"] > 0.01
    for key in ("perplexity", "perplexity_dense", "kl", "top1_agreement"):
        assert a[key] == pytest.approx(b[key], rel=1e-3), key
    assert (a["activation"], a["kv_share"]) == (b["activation"], b["kv_share"])
    for part in ("tasks", "passkey", "ruler"):
        assert first[part] == second[part]
    assert [row["task"] for row in first["ruler"]] == ["niah_single_2", "niah_multikey_3", "mean"]
    assert 0.2 < first["ruler"][-1]["activation"] < 0.8 and first["ruler"][-1]["kv_share"] < 0.9
    assert [row["task"] for row in first["tasks"]] == [
        "piqa",
        "winogrande",
        "mmlu",
        "lambada",
        "mean",
    ]


def test_torch_in_another_type(folder):
    plan = EvaluationPlan(texts=[folder / "text.txt"], length=LENGTH, count=1)
    found = {
        dtype: eval_run.evaluate(folder / "mod", plan, threads=1, dtype=dtype)
        for dtype in ("auto", "bfloat16")
    }
    assert found["auto"]["about"]["dtype"] == {"dense": "float32", "mod": "float32"}
    assert found["bfloat16"]["about"]["dtype"] == {"dense": "bfloat16", "mod": "bfloat16"}
    exact, rounded = (found[dtype]["texts"][0]["perplexity"] for dtype in found)
    assert exact != rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("name", ["dense", "mod"])
def test_choices_and_answers_are_the_same_in_both(pairs, items, name):
    """Choices longer than kv_rollback too: after each of them the sequence is what it was."""
    ours, theirs = pairs["torch"].readers()[name], pairs["runtime"].readers()[name]
    for item in items:
        for a, b in zip(
            scoring.likelihoods(ours, item), scoring.likelihoods(theirs, item), strict=True
        ):
            assert a[0] == pytest.approx(b[0], abs=2e-3) and a[1] == b[1]
    prompt = items[3].ids[0]
    assert passkey.generate(ours, prompt, 12) == passkey.generate(theirs, prompt, 12) != ""


def test_likelihood_by_hand(pairs, items):
    """The sum of log p(token | all before it) over the choice's tokens, from one forward over
    question and choice.
    """
    reader = pairs["torch"].mod
    for item in items:
        usage, active = Usage(), 0
        found = scoring.likelihoods(reader, item, usage)
        for ids, given, (total, greedy) in zip(item.ids, item.given, found, strict=True):
            with torch.no_grad():
                logits, trace = reader.model(torch.tensor([ids]), trace=True)
            log_p = logits[0].log_softmax(-1)
            expected = sum(log_p[i - 1, ids[i]].item() for i in range(given, len(ids)))
            assert total == pytest.approx(expected, abs=2e-3)
            assert greedy == all(log_p[i - 1].argmax() == ids[i] for i in range(given, len(ids)))
            active += int(trace.active[0, :-1].sum())
        assert usage.active == active and usage.sequences == len(item.ids)


def test_accuracy_by_hand(pairs, items):
    """Each task's row from its items' likelihoods; one item is there twice, as another task."""
    pair = pairs["torch"]
    again = replace(items[0], item=replace(items[0].item, task="again", answer=1))
    rows = scoring.accuracy(pair, [items[0], items[1], again, items[3]])
    for row, item in zip(rows, [items[0], items[1], again, items[3]], strict=False):
        for name, reader in pair.readers().items():
            found = scoring.likelihoods(reader, item)
            best = max(range(len(found)), key=lambda i, found=found: found[i][0])
            acc = found[0][1] if item.item.greedy else best == item.item.answer
            assert row[name]["acc"] == acc and row[name]["acc_stderr"] is None and row["items"] == 1
    assert rows[0]["dense"]["acc"] + rows[2]["dense"]["acc"] == 1
    assert rows[3]["dense"]["acc_norm"] is None and rows[-1]["task"] == "mean"
    assert rows[-1]["mod"]["acc"] == sum(row["mod"]["acc"] for row in rows[:-1]) / 4


def test_choices_by_likelihood_and_by_byte(items):
    """The first item's choices have 505 and 11 bytes: -470 is less than one a byte."""
    item = items[0].item
    assert [len(scored.strip()) for _, scored in item.texts] == [505, 11]
    assert scoring.choose(item, [(-1.0, False), (-9.0, False)]) == (0, (True, True))
    assert scoring.choose(item, [(-470.0, False), (-11.0, True)]) == (1, (False, True))
    assert scoring.choose(items[3].item, [(-3.0, True)]) == (1, (True, None))
    shares = scoring._shares([(True, None), (False, None), (True, None)])
    assert shares["acc"] == pytest.approx(2 / 3) and shares["acc_stderr"] == pytest.approx(1 / 3)


def test_memory_is_bounded_and_kv_is_what_the_runtime_holds(pairs):
    """A few hundred rows of logits at most; no K/V but those that a next token can see."""
    reader = pairs["runtime"].mod
    reader.reset()
    tokens = pack(reader.tokenizer, TEXT, 600)[0].tolist()
    assert [len(rows) for rows in reader.blocks(tokens)] == [ROWS, ROWS, 600 - 2 * ROWS]
    assert len(reader.llm.scores) < 600 == len(reader.active)
    usage = Usage()
    usage.add(reader)
    kv = reader.llm.kv()
    assert kv.used / kv.dense == pytest.approx(usage.shares()["kv_share"], abs=1e-6)


def test_shift_moves_the_measured_model_only(folder, pairs):
    ids = pack(tiny.tokenizer(), TEXT, LENGTH, count=1)
    plain = perplexity.loss(pairs["runtime"], ids)
    for target in ("mod", "mod.gguf"):
        found = perplexity.loss(open_pair(folder / target, shift=0.5, threads=1), ids)
        assert found.activation < plain.activation - 0.05 and found.kv_share < plain.kv_share
        assert found.perplexity_dense == pytest.approx(plain.perplexity_dense, rel=1e-4)


def test_types_of_k_and_v_are_those_of_the_measured_model(folder):
    plan = EvaluationPlan(texts=[folder / "text.txt"], length=LENGTH, count=1)
    exact, rounded = (
        eval_run.evaluate(folder / "mod.gguf", plan, threads=1, types=types)
        for types in (None, KVTypes("bf16", "f16"))
    )
    assert (exact["about"]["kv_type"], rounded["about"]["kv_type"]) == (None, "bf16/f16")
    (a,), (b,) = exact["texts"], rounded["texts"]
    assert a["perplexity_dense"] == b["perplexity_dense"]
    assert a["perplexity"] != b["perplexity"] == pytest.approx(a["perplexity"], rel=0.05)


def test_dense_models_and_another_dense_model(folder, tmp_path):
    """A model without routers has dense figures alone; --dense takes torch beside the runtime."""
    ids = pack(tiny.tokenizer(), TEXT, LENGTH, count=1)
    plain = tiny.base(n_vocab=len(tiny.tokenizer()))
    plain.save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    both = perplexity.loss(open_pair(folder / "mod.gguf", dense=tmp_path / "plain", threads=1), ids)
    assert both.kl > 0
    for target in (tmp_path / "plain", folder / "dense.gguf"):
        alone = perplexity.loss(open_pair(target, threads=1), ids)
        assert alone.perplexity_dense == pytest.approx(both.perplexity_dense, rel=1e-4)
        assert alone.perplexity is alone.kl is alone.activation is alone.kv_share is None
    same = perplexity.loss(
        open_pair(folder / "dense.gguf", dense=tmp_path / "plain", threads=1), ids
    )
    assert same.kl < 1e-5 and same.activation == same.kv_share == 1


def test_the_command(folder, tmp_path, run_cli):
    common = (
        "eval",
        folder / "mod.gguf",
        "--text",
        folder / "text.txt",
        "--length",
        128,
        "--count",
        1,
        "--threads",
        1,
        "--tasks",
        folder / "tasks.jsonl",
        "--passkey",
        folder / "text.txt",
        "--passkey-lengths",
        "200,256",
        "--passkey-trials",
        1,
        "--passkey-depths",
        "0.2,0.8",
        "--ruler",
        "qa_1,vt",
        "--ruler-lengths",
        1024,
        "--ruler-samples",
        1,
        "--last",
        60,
        "--plots",
        tmp_path / "plots",
    )
    result = run_cli(*common, "--json", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    assert "1 items of gsm8k left out" in result.stderr and "perplexity dense" in result.stdout
    assert "acc_norm MoD" in result.stdout and "passkey: tokens" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert "RULER's squad are made-up documents" in result.stderr and "RULER" in result.stdout
    assert found["about"]["ruler_stand_ins"].keys() == {"squad"}
    assert not (tmp_path / "out.json.partial").exists()
    assert [len(found[part]) for part in ("texts", "tasks", "passkey", "ruler")] == [1, 5, 2, 3]
    assert found["texts"][0]["tokens"] == 60
    assert found["passkey"][0]["mod_by_depth"].keys() == {"0.2", "0.8"}
    for name in ("passkey", "tasks"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    again = run_cli(*common, "--json", "-")
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["mod"], "nothing to measure"),
        (["none", "--text", "text.txt"], "no such model: none"),
        (["text.txt", "--text", "text.txt"], "not a GGUF file"),
        (["mod", "--text", "none.txt"], "cannot read none.txt"),
        (["mod", "--text", "empty.txt"], "empty.txt: text too short"),
        (
            ["mod.gguf", "--text", "text.txt", "--length", "4096"],
            "do not fit the context of mod.gguf, 2048",
        ),
        (
            ["mod", "--passkey", "text.txt", "--passkey-lengths", "4096"],
            "do not fit the context of mod, 2048",
        ),
        (["mod", "--passkey", "empty.txt"], "passkey text is empty"),
        (
            ["mod", "--passkey", "text.txt", "--passkey-lengths", "64"],
            "'64' is no list of numbers from 128",
        ),
        (
            ["mod", "--passkey", "text.txt", "--passkey-depths", "2"],
            "'2' is no list of numbers from 0 to 1",
        ),
        (
            ["mod", "--text", "text.txt", "--length", "64", "--skip", "63"],
            "skipping 63 of 64 tokens leaves none",
        ),
        (["mod", "--tasks", "text.txt"], "text.txt:1 is no task item"),
        (["mod", "--text", "text.txt", "--skip", "9", "--last", "9"], "give one of them"),
        (["mod", "--ruler", "niah"], "'niah' is none of niah_single_1, niah_single_2"),
        (["mod", "--ruler", "fwe", "--ruler-lengths", "256"], "fwe does not fit into 256 tokens"),
        (
            ["mod.gguf", "--ruler", "fwe", "--ruler-lengths", "4096"],
            "do not fit the context of mod.gguf, 2048",
        ),
        (["mod", "--ruler", "qa_1", "--ruler-squad", "text.txt"], "text.txt is no file of SQuAD"),
        (
            ["mod.gguf", "--text", "text.txt", "--threshold-shift", "nan"],
            "nan is not a finite number",
        ),
        (["bare", "--text", "text.txt"], "bare has no tokenizer"),
        (["mod", "--dense", "other", "--text", "text.txt"], "have different tokenizers"),
        (["other", "--text", "text.txt", "--threshold-shift", "1"], "no thresholds to shift"),
        (["mod", "--text", "text.txt", "--device", "abacus"], "unknown device 'abacus'"),
        (
            ["mod.gguf", "--text", "text.txt", "--device", "cuda"],
            "mod.gguf is a file; use --gpu-layers",
        ),
        (
            ["mod.gguf", "--text", "text.txt", "--dtype", "bfloat16"],
            "--dtype bfloat16 is of models in torch, and mod.gguf is a file",
        ),
        (["numbers.gguf", "--text", "text.txt"], "numbers.gguf has no tokenizer"),
        (["mod", "--text", "text.txt", "-ctk", "q8_0"], "mod is a directory, which has no types"),
        (["mod.gguf", "--text", "text.txt", "-ctv", "q8_0"], "blocks of 32 values, but a head"),
    ],
)
def test_errors_are_one_line(bad, monkeypatch, args, told, capsys):
    from mod_export.cli import main

    monkeypatch.chdir(bad)
    with pytest.raises(SystemExit) as caught:
        main(["eval", *args])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and told in err, err


@pytest.fixture(scope="module")
def bad(folder):
    """Beside the good ones: an empty text, a directory without tokenizer, another vocabulary, a
    file without one.
    """
    (folder / "empty.txt").write_text("\n")
    tiny.base().save_pretrained(folder / "bare")
    tiny.base().save_pretrained(folder / "other")
    byte_tokenizer().save_pretrained(folder / "other")
    Tiny().route([2], "kv").write(folder / "numbers.gguf")
    return folder


def test_readers_share_a_model(pairs):
    """The dense reader forces its own forwards only, and leaves the model as it was."""
    model = pairs["torch"].mod.model
    pair = torch_pair(model)
    tokens = pack(model.tokenizer, TEXT, 64)[0].tolist()
    alone = TorchReader(model)
    alone.last(tokens)
    for one in tokens:
        pair.dense.last([one])
        pair.mod.last([one])
    assert model.force is None and bool(pair.dense.active.all())
    assert torch.equal(pair.mod.active, alone.active) and not bool(alone.active.all())
