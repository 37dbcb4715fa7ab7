"""`convert` to a GGUF file: of models whose tokenizer llama.cpp does not have, and of a hybrid."""

import json

import pytest

from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.draft_heads import with_head
from tests.support.gguf_models import write_models
from tests.support.hub_server import HubServer
from tests.support.model_types import HYBRIDS


def whole_numbers(folder):
    """Leave numbers whole, which this vocabulary cuts into digits."""
    tiny.tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    del data["pre_tokenizer"]["pretokenizers"][0]
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("save_tokenizer", "message"),
    [
        (whole_numbers, "cut texts differently with the tokenizer of the converted org/odd: of '"),
        (
            byte_tokenizer().save_pretrained,
            "llama.cpp does not know the tokenizer of the converted org/odd;",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_matched_is_refused_before_the_work(
    tmp_path, run_cli, monkeypatch, save_tokenizer, message
):
    tiny.base(n_layer=3, n_vocab=len(tiny.tokenizer())).save_pretrained(tmp_path / "odd")
    save_tokenizer(tmp_path / "odd")
    (tmp_path / "out").mkdir()
    with HubServer({"org/odd": tmp_path / "odd"}) as hub:
        hub.use(monkeypatch, tmp_path / "home")
        done = run_cli("convert", "org/odd", "-o", "model.gguf", cwd=tmp_path / "out")
    *progress, error = done.stderr.splitlines()
    assert done.returncode == 2 and message in error, done.stderr
    assert error.endswith("put the routers on a GGUF of the model with --base")
    assert not any("calibrat" in line for line in progress) and "snapshots" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_gguf_file_of_a_hybrid_with_layers_for_drafts(tmp_path, run_cli):
    """In one step the result is no adapter, and a line said how to make a GGUF file of it."""
    plain = write_models(tmp_path, {"hybrid": HYBRIDS["qwen3_5"]})["hybrid"]
    file = with_head(plain, tmp_path / "drafts.gguf", layer=1)
    (tmp_path / "text.txt").write_text("Some words, and then more of them. " * 60)
    options = ["--calibration-text", tmp_path / "text.txt", "--kv-window", "32"]
    done = run_cli("convert", file, "-o", tmp_path / "mod.gguf", *options)
    assert done.returncode == 0, done.stderr
    assert "same logits on the runtime" in done.stderr
    assert "routers alone" not in done.stderr and "[transformers]" not in done.stderr
    assert "6 layers and 1 for drafts" in run_cli("inspect", tmp_path / "mod.gguf").stdout
