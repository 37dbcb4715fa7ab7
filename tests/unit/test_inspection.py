"""The report of a GGUF file."""

import json
import math

import pytest

from mod_export.export import export, read_directory
from mod_export.formats.kv_size import ROLLBACK_TOKENS
from mod_export.inspection import inspect, render
from tests.support.mod_files import write_directory
from tests.support.tiny_gguf import Tiny

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("model") / "mod", UNITS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tiny = Tiny(n_layer=6, n_embd=64, n_head=4, n_head_kv=2, n_ff=64)
    return tiny.write(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def mod_file(tmp_path_factory, mod_dir, base):
    path = tmp_path_factory.mktemp("out") / "mod.gguf"
    export(mod_dir, path, base=base)
    return path


def test_inspect_tells_what_export_wrote(mod_file, mod_dir):
    config, _ = read_directory(mod_dir)
    report = inspect(mod_file)
    assert [(unit["layer"], unit["kind"]) for unit in report["mod"]["units"]] == config.routed()
    assert report["mod"]["activation"] == {"kv": 0.5, "attn": 0.5, "ffn": 0.5, "all": 0.5}
    assert json.loads(json.dumps(report)) == report
    assert "4 routed units" in render(report)


def test_expected_kv(mod_file):
    kv = inspect(mod_file)["mod"]["kv"]
    per_layer = 2 * 2 * 16 * 2  # K and V, 2 heads of 16 values, f16
    assert kv["bytes_per_token_dense"] == 6 * per_layer
    [first, *_] = kv["expected"]
    window = 8 + ROLLBACK_TOKENS
    kept = window + 0.5 * (1000 - window)
    # layer 2: kv; layer 3: kv and attn; the other four are complete
    assert first["bytes_mod"] == round(per_layer * (4 * 1000 + kept + 0.5 * kept))
    assert math.isclose(first["share"], first["bytes_mod"] / (6000 * per_layer))


def test_inspect_a_dense_file(base):
    report = inspect(base)
    assert report["mod"] is None and "dense" in render(report)


def test_inspect_json(run_cli, mod_file):
    result = run_cli("inspect", mod_file, "--json")
    assert json.loads(result.stdout) == inspect(mod_file)
