"""The commands behind the figures of docs/results and docs/log.md, on a tiny model: they
keep running.

What they measure is tested where it is made; here every stage runs, and its rows and tables hold
what they should.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mod_export.data import text as data_text
from mod_export.errors import UserError
from mod_export.export import export
from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel
from scripts.studies import calibration, drift, gemma3, kv_types, train_speed, training, unit_value
from scripts.studies.kv_types_report import kl_at_equal_bytes
from scripts.studies.lengths import activation_by_length
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer
from tests.support.tiny_gguf import Tiny

ROOT = Path(__file__).resolve().parents[2]


def invoke(command, *args, code=0) -> str:
    result = CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_study_of_kv_types(tmp_path):
    """Every file with every type beside the dense one in f16; what is there is not done again."""
    mod = Tiny(vocab=True, kv_window=8).route([1, 2, 4], "kv")
    files = [mod.dense().write(tmp_path / "dense.gguf"), mod.write(tmp_path / "mod.gguf")]
    (tmp_path / "a.txt").write_text("Some words. " * 50)
    options = ["--text", tmp_path / "a.txt", "--length", 128, "--out", tmp_path / "rows.jsonl"]
    options += ["--count", 1, "--types", "f16", "--types", "q8_0", "--rounds", 1]
    told = invoke(kv_types.main, *files, *options, "--plot", tmp_path / "plot.png")
    found = {(row["file"], row["kv_type"]): row for row in rows(tmp_path / "rows.jsonl")}
    exact, rounded = found["dense.gguf", "f16"], found["dense.gguf", "q8_0"]
    assert exact["kl"] == 0 < rounded["kl"] < found["mod.gguf", "f16"]["kl"]
    assert exact["kv_bytes"] == 128 * 5 * 2 * 2 * 2 * 32
    assert (
        rounded["kv_bytes"] == exact["kv_bytes"] * 34 / 64 > found["mod.gguf", "q8_0"]["kv_bytes"]
    )
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "128 tokens" in told and told.count("| mod.gguf") == 2
    told = invoke(kv_types.main, files[0], *options, "--speed")
    assert [row["context"] for row in rows(tmp_path / "rows.jsonl")[4:]] == [128, 128]
    assert told.count("| dense.gguf") == 2


def test_dense_kl_at_equal_bytes():
    """On the line through the dense model's types where both axes are logarithms."""
    dense = [
        {"file": "d", "length": 8, "kv_bytes": b, "kl": k} for b, k in ((1e4, 0.1), (1e6, 1e-3))
    ]
    at = {
        size: kl_at_equal_bytes({"file": "m", "length": 8, "kv_bytes": size}, dense, "d")
        for size in (1e3, 1e5, 1e7)
    }
    assert at == {1e3: None, 1e5: pytest.approx(0.01), 1e7: None}
    assert kl_at_equal_bytes(dense[0], dense, "d") is None


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def little_to_calibrate_on(monkeypatch):
    parts = tuple(text[:15000] for text in data_text.default_texts())
    monkeypatch.setattr(data_text, "default_texts", lambda: parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and two texts."""
    path = tmp_path_factory.mktemp("study")
    tiny.base().save_pretrained(path / "base")
    byte_tokenizer().save_pretrained(path / "base")
    text = TEXT * 10
    (path / "train.txt").write_text(text[:20000])
    (path / "a.txt").write_text(text[20000:80000])
    return path


def test_training_study(place):
    study, out = training.study, place / "out"
    names = [
        "attn-0.8-calibrated",
        "attn-0.8-lora",
        "attn-0.8-static",
        "attn-0.8-topk",
        "attn-0.8-no-distillation",
        "kv-0.5-routers",
        "kv-0.5-window",
        "attn-0.8+kv-0.1138-lora",
    ]
    assert set(names) < {line.split()[0] for line in invoke(study, "list").splitlines()}
    texts = ("--text", f"a={place}/a.txt")
    run = (
        "run",
        "--model",
        place / "base",
        "--out",
        out,
        "--data",
        place / "train.txt",
        *texts,
        "--tokens",
        1280,
        "--train-length",
        320,
        "--length",
        512,
        "--count",
        1,
    )
    invoke(study, *run, *names[:3])
    invoke(study, *run, *names)
    found = {row["name"]: row for row in rows(out / "rows.jsonl")}
    assert (
        sorted(found) == sorted(names) == sorted(row["name"] for row in rows(out / "rows.jsonl"))
    )  # none twice
    for name, row in found.items():
        assert row["texts"]["a"]["kl"] > 0, name
        if isinstance(row["target"], float) and "equal" in row:
            assert row["equal"]["a"]["activation"] == pytest.approx(row["target"], abs=0.01), name
    assert {name for name, row in found.items() if "equal" not in row} == {
        n for n in names if n.endswith(("static", "topk", "window"))
    }

    judged = invoke(
        study,
        "judge",
        out / "attn-0.8-lora",
        "--model",
        place / "base",
        "--target",
        0.8,
        *texts,
        "--length",
        512,
    )
    assert f"{found['attn-0.8-lora']['equal']['a']['kl']:.4f}" in judged
    again = place / "another"
    (out / "attn-0.8-lora").rename(again)
    judge = (
        "judge",
        again,
        "--model",
        place / "base",
        "--target",
        0.8,
        *texts,
        "--length",
        512,
        "--out",
        out,
    )
    invoke(study, *judge)
    (row,) = (row for row in rows(out / "rows.jsonl") if row["name"] == "another")
    for key in ("texts", "equal"):
        assert row[key]["a"]["kl"] == pytest.approx(
            found["attn-0.8-lora"][key]["a"]["kl"], rel=1e-4
        )
    assert "has a row another already" in invoke(study, *judge, code=2)

    shutil.copytree(out / "kv-0.5-routers", place / "without-target")
    invoke(
        study, "judge", place / "without-target", *judge[2:4], *texts, "--length", 512, "--out", out
    )

    shutil.rmtree(again)  # GGUF files need a tokenizer that llama.cpp knows
    tiny.save_dir(again, {"attn": [3, 4]})
    tiny.save_dir(out / "attn-0.8-lora", {"attn": [3, 4]})
    invoke(study, "time", "attn-0.8-lora", "another", "--out", out, "--context", 128, "--rounds", 2)
    timed = rows(out / "times.jsonl")
    assert sorted(row["name"] for row in timed) == ["another", "attn-0.8-lora"]
    assert all(row["decode"]["median"] > 0 and row["measured"] > "20" for row in timed)
    assert [*out.glob("*.gguf")] == [out / "dense-q8_0.gguf"]
    table = invoke(study, "report", "--out", out)
    assert all(row["way"] in table for row in found.values()) and "decode / dense" in table
    assert any(
        line.split("|")[2].strip() == "" for line in table.splitlines() if "trained" in line
    )  # These rows have no goal.
    assert all(
        (out / picture).read_bytes().startswith(b"\x89PNG")
        for picture in ("training.png", "frontier.png")
    )
    assert "decode / dense" not in invoke(
        study, "report", "--out", out, "--measured", "another machine"
    )

    kept = ROOT / "docs" / "results" / "data" / "frontier"  # perplexities alone
    (place / "plots").mkdir()
    table = invoke(study, "report", "--out", kept, "--docs", place / "plots", "--measured", "Xeon")
    assert table.count("| kv-smollm2-kv ") == 1 and "KL" not in table
    assert [path.name for path in (place / "plots").iterdir()] == ["frontier.png"]


def test_activation_by_length(place):
    """As the trace of a forward says, in a directory; a GGUF file says the same."""
    model, study = (
        tiny.save_dir(place / "lengths", {"kv": [2, 3], "ffn": [4]}),
        training.study,
    )
    lengths, texts = (64, 256, 512), {"a": place / "a.txt"}
    (found,) = activation_by_length(place / "lengths", texts, lengths, 3).values()
    sequences = data_text.pack(model.tokenizer, (place / "a.txt").read_text(), 512, 3)
    for ids, shares in zip(sequences, found, strict=True):
        active = model(ids[None], trace=True)[1].active[0].float()
        assert shares == pytest.approx(
            [active[:length].mean().item() for length in lengths], abs=2e-3
        )
    assert len({round(share, 4) for shares in found for share in shares}) > 3

    export(place / "lengths", place / "lengths.gguf", quant="f32")
    (runtime,) = activation_by_length(place / "lengths.gguf", texts, lengths, 3).values()
    assert torch.tensor(runtime).sub(torch.tensor(found)).abs().max() < 2e-3

    table = invoke(
        study,
        "lengths",
        place / "lengths",
        "--text",
        f"a={place}/a.txt",
        "--length",
        64,
        "--length",
        512,
        "--count",
        3,
    ).splitlines()
    cells = [cell.strip() for cell in table[-1].strip("|").split("|")]
    means = [sum(shares[i] for shares in found) / 3 for i in (0, 2)]
    assert [float(cell.split()[0]) for cell in cells[1:3]] == pytest.approx(means, abs=6e-4)
    assert float(cells[3]) == pytest.approx(abs(means[0] - means[1]), abs=1.1e-3)
    with pytest.raises(UserError, match="is a dense model"):
        activation_by_length(place / "base", texts, lengths, 1)


@pytest.mark.parametrize("parameters", ["routers", "lora", "full"])
def test_train_speed(place, parameters):
    if not (place / "mod").exists():
        tiny.save_dir(place / "mod", {"kv": [2, 3], "attn": [4]})
    table = invoke(
        train_speed.main,
        place / "mod",
        "--text",
        place / "a.txt",
        "--train",
        parameters,
        "--length",
        64,
        "--rounds",
        1,
    )
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == [parameters, "64", "1"] and float(cells[-1]) > 0


def test_the_value_is_what_the_divergence_rises_by(place):
    """Against switching units one by one. They are made to add little, so that the KL is about
    quadratic.
    """
    model = tiny.save_dir(place / "ffn", {"ffn": [2, 3, 4]})
    for layer in architectures.decoder_layers(model.base):
        layer.ffn.down_proj.weight.data *= 0.1
    model.save(place / "ffn", force=True)
    dense = MoDModel.from_base(loading.load(place / "ffn")[0], model.tokenizer)
    model.requires_grad_(False)
    torch.manual_seed(0)
    ids = torch.randint(0, 250, (40,))
    value, _, z, active, kl, x = unit_value.measure(model, dense, ids, draws=100, autocast=False)
    assert 0.2 < active.mean() < 0.9 and kl.sum() > 0 and x.shape[:2] == (3, 40)
    units, expected, found = model.config.routed(), [], []
    log_p = dense(ids[None])[0].log_softmax(-1)

    def divergence(decided):
        given = {unit: decided[None, :, i] for i, unit in enumerate(units)}
        return (
            (log_p.exp() * (log_p - model(ids[None], decisions=given)[0].log_softmax(-1)))
            .sum()
            .item()
        )

    for token in range(4, 40, 3):
        for i in range(3):
            both = []
            for state in (True, False):
                decided = active.bool().clone()
                decided[token, i] = state
                both.append(divergence(decided))
            expected.append(both[1] - both[0])
            found.append(value[token, i].item())
    assert torch.corrcoef(torch.tensor([expected, found]))[0, 1] > 0.95
    assert sum(found) == pytest.approx(sum(expected), rel=0.1)

    table = invoke(
        unit_value.main,
        place / "ffn",
        "-d",
        place / "a.txt",
        "--original",
        place / "ffn",
        "--sequences",
        6,
        "--length",
        64,
        "--float32",
    )
    cells = [line.split("|") for line in table.splitlines() if line.count("|") == 3][2:]
    lost = {name.strip(): float(value) for _, name, value, _ in cells}
    assert set(lost) == {"as trained", "by the curvature itself", "at random", *unit_value.FITS}
    assert lost["by the curvature itself"] < lost["at random"]
    tiny.save_dir(place / "attn", {"attn": [2]})
    assert "only ffn units" in invoke(
        unit_value.main, place / "attn", "-d", place / "a.txt", code=1
    )


def test_drift_study(place):
    (place / "long.txt").write_text("\n".join([TEXT] * 3))
    run = (
        "--model",
        place / "base",
        "--text",
        f"a={place}/long.txt",
        "--out",
        place / "drift",
        "--penalties",
        "0,10",
        "--layers-routed",
        "1-5,2-5",
    )
    invoke(drift.main, *run)
    invoke(drift.main, *run)
    found = rows(place / "drift" / "rows.jsonl")
    assert [(row["layers"], row["drift_penalty"]) for row in found] == [
        ("1-5", 0.0),
        ("1-5", 10.0),
        ("2-5", 0.0),
    ]
    assert all(len(row["activation"]["a"]) == 4 and row["equal"]["a"]["kl"] > 0 for row in found)


def test_calibration_study(place):
    study, out = calibration.study, place / "calibration"
    given = (
        "--model",
        place / "base",
        "--text",
        f"a={place}/a.txt",
        "--out",
        out,
        "--length",
        256,
        "--sequences",
        1,
        "--kinds",
        "kv,ffn",
        "--kv-window",
        16,
        "--threads",
        1,
    )
    invoke(study, "scores", *given)
    invoke(study, "table", *given, "--targets", "0.7,0.5")
    table = invoke(study, "report", "--out", out)
    assert "ffn" in (out / "study.md").read_text() + table
    assert all(row["kl"] > 0 for path in out.glob("*.jsonl") for row in rows(path))


def table_of(report: str, title: str) -> list[dict[str, str]]:
    """The rows of a table in Markdown, by its header."""
    lines = report.split(f"\n{title}\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_gemma3_study(place, monkeypatch):
    """On a tiny Llama: what the study does depends on no architecture."""
    study, out, text = gemma3.study, place / "gemma3", place / "a.txt"
    little = ("--kv-window", "16", "--calibration-text", str(text))
    monkeypatch.setattr(gemma3, "POINTS", {"kv-50": (*gemma3.POINTS["kv-50"], *little)})
    tiny.save_dir(place / "original", {"kv": [2, 3]})
    dense = place / "original.gguf"
    export(place / "original", dense, quant="q8_0", dense=True)
    assert invoke(study, "report", "--out", out).count("not measured yet") == 7

    given = (dense, "--out", out, "--point", "kv-50")
    make = ("make", *given, "--threads", 1)
    assert invoke(study, *make).count("mod-export ") == 5
    assert invoke(study, *make) == ""  # All is there.
    report = invoke(study, "report", "--out", out)
    assert report.count("not measured yet") == 5
    assert f"dense: {gemma3.PROMPT}" in report and f"kv-50: {gemma3.PROMPT}" in report
    (row,) = table_of(report, "parity")
    assert row["passed"] == "yes" and float(row["same decisions"]) > 0.98

    judge = ("--text", text, "--haystack", text, "--count", 1, "--depths", 0.5, "--trials", 2)
    for length in (512, 1024):
        invoke(study, "judge", *given, *judge, "--passkey", length, "--threads", 1)
    invoke(study, "time", *given, "--context", 256, "--rounds", 2, "--seconds", 0)
    report = invoke(study, "report", "--out", out)
    assert "not measured" not in report
    (row,) = table_of(report, "quality")
    ratio = float(row["MoD"]) / float(row["perplexity dense"])
    assert row["text"] == "a" and float(row["MoD / dense"]) == pytest.approx(ratio, abs=1e-3)
    assert 0.3 < float(row["activation"]) < 0.7 and float(row["KL"]) > 0
    keys = table_of(report, "passkeys")
    assert [row["tokens"] for row in keys] == ["512", "1024"]
    assert all(row["dense finds"].endswith(" of 2") for row in keys)
    times = table_of(report, "time")
    assert [row["phase"] for row in times] == ["prefill", "decode"]
    assert all(float(row["all active / dense"].split()[0]) > 0 for row in times)
    (row,) = table_of(report, "memory")
    assert float(row["committed / used"]) >= 1
    assert float(row["used"]) / float(row["K/V dense, MiB"]) == pytest.approx(
        float(row["used / dense"]), abs=0.02
    )

    part = out / "kv-50.quality.json"
    part.write_text("{")
    with pytest.raises(UserError, match=r"kv-50.quality.json is no result of a step"):
        invoke(study, "report", "--out", out)
    part.unlink()
    missing = ("--text", place / "original.gguf", *judge[2:])
    with pytest.raises(UserError, match="mod-export eval failed with exit code 2"):
        invoke(study, "judge", *given, *missing)
    assert not part.exists()
