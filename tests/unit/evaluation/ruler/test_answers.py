"""Answers of models to RULER: what a row says, and what a stopped run keeps."""

import pytest

from mod_export.errors import UserError
from mod_export.evaluation.readers import Usage, torch_pair
from mod_export.evaluation.ruler import answers, sources
from mod_export.evaluation.ruler.tasks import make_samples
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def pair():
    model = tiny.mod_model({"kv": [2, 3], "ffn": [4]}, n_vocab=300)
    model.tokenizer = byte_tokenizer()
    return torch_pair(model)


@pytest.fixture(scope="module")
def samples(pair):
    made = make_samples(pair.dense.tokenizer, sources.read(), ["niah_single_1", "vt"], [2304], n=2)
    return [sample for sample in made if sample.task == "vt"] + made[:1]


def test_usage_is_of_the_context_alone(pair, samples):
    record = answers.answer(pair, samples[0])
    usage, reader = Usage(), pair.mod
    reader.reset()
    reader.last(samples[0].context)
    usage.add(reader)
    assert Usage(**record["usage"]) == usage and usage.pairs == 3 * len(samples[0].context)
    assert 0 < usage.active < usage.pairs
    assert record["answers"] == samples[0].answers and record["mod"]["score"] == 0


def test_an_answer_ends_where_all_is_found(pair, samples):
    """An answer that the model gives anyway is found at once; the rest is not generated."""
    from dataclasses import replace

    said = answers.answer(pair, samples[0])["mod"]["text"]
    sample = replace(samples[0], answers=[said[:2]])
    found = answers.answer(pair, sample)["mod"]
    assert found["score"] == 1 and said.startswith(found["text"]) and len(found["text"]) < len(said)


def test_a_stopped_run_goes_on(pair, samples, tmp_path):
    whole = answers.answer_all(pair, samples)
    keep = tmp_path / "out.json"

    def stopped(items):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.answer_all(pair, samples, stopped, keep)
    kept = (tmp_path / "out.json.partial").read_bytes()
    with pytest.raises(UserError, match="run with other options: .*prompts was"):
        answers.answer_all(pair, samples[1:], keep=keep)
    asked = []
    found = answers.answer_all(
        pair, samples, lambda items: iter(asked.extend(items) or items), keep
    )
    assert asked == samples[1:] and (tmp_path / "out.json.partial").read_bytes().startswith(kept)
    assert [{**record, "id": 0} for record in found] == [{**record, "id": 0} for record in whole]
    answers.forget(keep)
    assert list(tmp_path.iterdir()) == []


def record(task: str, dense: float, mod: float | None, active: int = 0) -> dict:
    usage = {"pairs": 10, "active": active, "kv_shares": active / 20, "sequences": 1}
    models = {"dense": dense} | ({} if mod is None else {"mod": mod})
    return {
        "task": task,
        "length": 2048,
        "usage": usage,
        **{name: {"text": "", "score": score} for name, score in models.items()},
    }


def test_rows_by_hand():
    rows = answers.by_task(
        [
            record("vt", 1, 0.5, 4),
            record("vt", 0, 0.5, 6),
            record("fwe", 1, 1, 2),
            record("fwe", 1, 0, 2),
        ]
    )
    assert [(row["task"], row["samples"]) for row in rows] == [("vt", 2), ("fwe", 2), ("mean", 4)]
    assert [row["dense"] for row in rows] == [0.5, 1, 0.75]
    assert [row["mod"] for row in rows] == [0.5, 0.5, 0.5]
    assert [row["dense_stderr"] for row in rows] == [0.5, 0, 0.25]
    assert [row["activation"] for row in rows] == pytest.approx([0.5, 0.2, 0.35])
    assert [row["kv_share"] for row in rows] == pytest.approx([0.25, 0.1, 0.175])


def test_rows_of_a_dense_model():
    (row,) = answers.by_task([record("vt", 1, None)])
    assert row["dense"] == 1 and row["dense_stderr"] is None
    assert row["mod"] is row["mod_stderr"] is row["activation"] is row["kv_share"] is None
