"""lm-evaluation-harness: torch, the GGUF file and the harness's own class give the same figures.

It lies in this tier because `scripts/test server` installs the harness.
"""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")

import datasets
import lm_eval
from lm_eval.tasks import TaskManager

from mod_export.errors import UserError
from mod_export.evaluation import harness
from mod_export.export import export
from mod_export.formats.gguf import GGUFFile
from scripts.studies import lm_eval_tasks
from tests.support import tiny_torch as tiny
from tests.support.routers_beside import write_adapter

TASKS = tuple(lm_eval_tasks.TASKS)


@pytest.fixture(scope="module", autouse=True)
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    lm_eval_tasks.write(folder, 2)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A MoD directory of every kind, its file, and the directory and file without routers."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.save_dir(folder / "mod", tiny.UNITS["kv+attn+ffn"], tiny.IDS, n_ctx=1024)
    model.base.save_pretrained(folder / "plain")
    model.tokenizer.save_pretrained(folder / "plain")
    export(folder / "mod", folder / "mod.gguf", quant="f32")
    export(folder / "mod", folder / "plain.gguf", quant="f32", dense=True)
    return folder


def answers(tasks, model: str, pretrained, names=TASKS, **more) -> dict[str, list]:
    """What the model gave for each item: likelihoods, or text."""
    result = lm_eval.simple_evaluate(
        model,
        {"pretrained": str(pretrained)} | more,
        tasks=list(names),
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        name: [value for sample in samples for value in sample["resps"]]
        for name, samples in result["samples"].items()
    }


def compare_next(first: dict, second: dict, tolerance: float) -> None:
    for a, b in zip(first["mod_next"], second["mod_next"], strict=True):
        [(a, a_best)], [(b, b_best)] = a, b
        assert a == pytest.approx(b, abs=tolerance) and str(a_best) == str(b_best)


def compare(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys() == set(TASKS)
    compare_next(first, second, tolerance)
    for a, b in zip(first["mod_bits"], second["mod_bits"], strict=True):
        assert a[0] == pytest.approx(b[0], abs=20 * tolerance)
    assert first["mod_copy"] == second["mod_copy"]


def test_torch_and_the_file_agree(tasks, folder):
    torch_, file = (answers(tasks, "mod-export", folder / n) for n in ("mod", "mod.gguf"))
    compare(torch_, file, 1e-2)
    dense = answers(tasks, "mod-export", folder / "plain.gguf", ["mod_next"])
    pairs = zip(file["mod_next"], dense["mod_next"], strict=True)
    assert max(abs(a[0][0] - b[0][0]) for a, b in pairs) > 0.1  # the routers matter


def test_routers_beside_a_file_and_an_adapter_on_its_model(tasks, folder):
    adapter = write_adapter(folder / "adapter", folder / "mod.gguf", folder / "plain.gguf")
    names = ["mod_next"]
    file = answers(tasks, "mod-export", folder / "mod.gguf", names)
    beside = answers(tasks, "mod-export", folder / "plain.gguf", names, mod=str(adapter))
    assert beside == file
    torch_ = answers(tasks, "mod-export", folder / "mod", names)
    on_base = answers(tasks, "mod-export", adapter, names, base=str(folder / "plain"))
    compare_next(on_base, torch_, 1e-4)


@pytest.mark.parametrize("name", ["plain", "plain.gguf"])
def test_dense_models_give_what_the_harness_gives(tasks, folder, name):
    limits = {"max_length": 300}  # pages and prompts are cut, and a text has several parts
    theirs = answers(tasks, "hf", folder / "plain", dtype="float32", **limits)
    compare(answers(tasks, "mod-export", folder / name, **limits), theirs, 1e-2)


def test_the_command(tasks, folder, run_cli, tmp_path):
    more = ("--", "--tasks", "mod_next", "--include_path", tasks, "--limit", 2)
    done = run_cli("lm-eval", folder / "mod.gguf", "--threshold-shift", 1, *more)
    assert done.returncode == 0, done.stderr
    assert "|mod_next|" in done.stdout and "acc_norm" in done.stdout
    for args, words in (
        ((folder / "none.gguf", *more), "no such"),
        ((folder / "plain.gguf", "--threshold-shift", 1, *more), "has no routers"),
    ):
        done = run_cli("lm-eval", *args)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
        assert words in done.stderr.splitlines()[-1]


def test_what_cannot_be_asked(tasks, folder):
    item = json.loads((tasks / "items.jsonl").read_text().splitlines()[0])
    model = harness.HarnessModel(str(folder / "mod.gguf"), max_length=64)
    with pytest.raises(UserError, match="more than 64 tokens"):
        model._loglikelihood_tokens([(None, [1], model.tok_encode(item["page"]))])
    instance = lm_eval.api.instance.Instance(
        "generate_until", {}, ("One", {"do_sample": True, "temperature": 1.0, "until": []}), 0
    )
    with pytest.raises(UserError, match="do_sample=False"):
        model.generate_until([instance])
    assert GGUFFile.open(folder / "mod.gguf").get("tokenizer.ggml.bos_token_id") == (
        model.prefix_token_id
    )
