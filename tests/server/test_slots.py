"""Slots on a MoD memory: whatever came before, an answer is that of a prompt read anew."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.completions import TEXT, TOKENS, anew, ask, same_answer, tokens
from tests.support.llama_server import Refused, started


@pytest.fixture(scope="module")
def server(mod, tmp_path_factory):
    more = ["-np", "8", "--slot-save-path", tmp_path_factory.mktemp("slots"), "--metrics"]
    more += ["--embeddings", "--pooling", "mean"]
    more += ["-ub", "128"]  # checkpoints are made so many tokens before the end of a prompt
    with started(mod, "--ctx", "4096", more=more) as server:
        yield server


def test_answers_at_once_are_those_of_one_after_the_other(server):
    prompts = [f"Story {n}. {TEXT * (n % 4 + 1)}Then, in the {n}th year," for n in range(8)]
    alone = [anew(server, prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda prompt: anew(server, prompt), prompts))
    assert all(map(same_answer, at_once, alone))


def test_prompts_that_part_anywhere(server):
    """The server died here: `failed to remove sequence 0 with p0=358`."""
    rng = random.Random(0)
    words = tokens(server, TEXT * 7)[:400]
    saved = 0
    for _ in range(8):
        cut = rng.randrange(1, 400)
        prompt = words[:cut] + rng.sample(words, rng.randrange(1, 60))
        # Other batches round otherwise, which tells after some tokens where decisions are close.
        answer = ask(server, prompt, id_slot=0, n_predict=6)
        assert same_answer(answer, anew(server, prompt, id_slot=1, n_predict=6)), cut
        saved += answer["timings"]["cache_n"] > 0
        if rng.random() < 0.3:
            ask(server, words, id_slot=0)
    assert saved >= 2


def test_an_edited_history_costs_what_comes_after_the_edit(server):
    turns = [{"role": "user", "content": TEXT * 5}, {"role": "assistant", "content": "I see."}]
    turns += [{"role": "user", "content": TEXT * 5}, {"role": "assistant", "content": "Yes."}]
    body = {"max_tokens": TOKENS, "temperature": 0, "id_slot": 2}
    last = {"role": "user", "content": "Name the month." + TEXT}
    server.post("/v1/chat/completions", body | {"messages": [*turns, last]})
    edited = {"role": "user", "content": "Name the boat." + TEXT}
    answer = server.post("/v1/chat/completions", body | {"messages": [*turns, edited]})
    read = answer["timings"]["prompt_n"]
    assert read < 150 < answer["usage"]["prompt_tokens"] / 3, answer["timings"]


def test_several_answers_to_one_prompt(server):
    body = {"prompt": TEXT * 2, "n_predict": 6, "temperature": 0, "n_cmpl": 3}
    answers = server.post("/completion", body)
    assert len({answer["content"] for answer in answers}) == 1 and len(answers) == 3


def test_a_slot_is_saved_and_restored(server):
    prompt = TEXT * 4
    first = ask(server, prompt, id_slot=0, threshold_shift=0.5)
    server.post("/slots/0?action=save", {"filename": "a.bin"})
    server.post("/slots/0?action=erase", {})
    with pytest.raises(Refused) as caught:  # its thresholds are others
        server.post("/slots/1?action=restore", {"filename": "a.bin"})
    assert caught.value.status == 400
    back = server.post("/slots/1?action=restore", {"filename": "a.bin", "threshold_shift": 0.5})
    assert back["n_restored"] > 200
    again = ask(server, prompt, id_slot=1, threshold_shift=0.5)
    assert same_answer(again, first)
    assert again["timings"]["prompt_n"] < 20


def test_a_shift_belongs_to_a_request(server):
    """A prefix that was read with another shift is read again, also from the prompt cache."""
    prompt = TEXT * 3
    plain, shifted = anew(server, prompt, id_slot=0), anew(server, prompt, threshold_shift=2)
    active = {}
    for shift, right in ((0.0, plain), (2.0, shifted), (0.0, plain), (2.0, shifted)):
        answer = ask(server, prompt, id_slot=0, threshold_shift=shift)
        assert same_answer(answer, right)
        figures = answer["timings"]["mod"]
        assert figures["shift"] == shift and figures["id_slot"] == 0
        active.setdefault(shift, figures["activation"].get("kv"))
    assert active[2.0] < active[0.0] - 0.05
    with ThreadPoolExecutor(4) as pool:  # in one batch they would have one shift
        shifts = [0.0, 2.0, 0.0, 2.0]
        at_once = pool.map(lambda x: anew(server, prompt, threshold_shift=x), shifts)
    assert all(map(same_answer, at_once, [plain, shifted, plain, shifted]))
    for wrong in ("2", [1], True, {"kv": 1}):
        with pytest.raises(Refused) as caught:
            ask(server, prompt, threshold_shift=wrong)
        assert caught.value.status == 400


@pytest.mark.parametrize("of", ["shift", "embeddings"])
def test_requests_that_share_no_batch_take_turns(server, of):
    """The second waited for as long as the first was busy."""
    body = {"prompt": TEXT, "n_predict": 400, "ignore_eos": True, "stream": True, "id_slot": 0}
    connection = server.open("/completion", body)
    stream = connection.getresponse()
    stream.read(50)
    if of == "shift":
        assert ask(server, "The sea", id_slot=1, threshold_shift=1, n_predict=4)["content"]
    else:
        assert server.post("/v1/embeddings", {"input": "The sea", "id_slot": 1})["data"]
    assert server.get("/slots")[0]["is_processing"]
    assert b"stop_type" in stream.read()
    connection.close()


def test_figures_and_trace(server):
    units = server.get("/props")["mod"]
    assert units["kinds"] == ["kv"] and units["kv_window"] == 32 and units["shift"] == 0
    assert {"layer", "kind", "head", "threshold", "activation", "window"} == set(units["units"][0])
    answer = ask(server, TEXT * 3, id_slot=2, cache_prompt=False)
    figures = answer["timings"]["mod"]
    assert 0 < figures["kv_used_bytes"] < figures["kv_dense_bytes"]
    assert server.get("/slots")[2]["mod"] == figures
    trace = server.get("/mod/trace?id_slot=2")
    assert trace["n_prompt"] == answer["timings"]["prompt_n"] == len(tokens(server, TEXT * 3))
    assert len(trace["tokens"]) == len(trace["active"]) == trace["n_prompt"] + TOKENS - 1
    said = "".join(token["text"] for token in trace["tokens"][trace["n_prompt"] :])
    assert said and answer["content"].startswith(said)
    rows = trace["active"]
    assert {len(row) for row in rows} == {len(units["units"])} and set("".join(rows)) == {"0", "1"}
    share = sum(row.count("1") for row in rows) / sum(map(len, rows))
    assert share == pytest.approx(figures["activation"]["kv"])
    for wrong, status, words in (("9", 404, "decoded nothing"), ("x", 400, "is a number")):
        with pytest.raises(Refused) as caught:
            server.get(f"/mod/trace?id_slot={wrong}")
        error = caught.value.body["error"]
        assert (caught.value.status, error["code"]) == (status, status)
        assert words in error["message"]
    metrics = dict(
        line.split() for line in server.get("/metrics").splitlines() if line.startswith("llamacpp:")
    )
    ratio = float(metrics['llamacpp:mod_activation_ratio{kind="kv"}'])
    used, dense, committed = (
        float(metrics[f"llamacpp:mod_kv_{name}_bytes"]) for name in ("used", "dense", "committed")
    )
    assert 0 < ratio < 1 and 0 < used < dense and used <= committed * 1.01


def test_a_client_that_leaves_is_not_served_on(server):
    connection = server.open("/completion", {"prompt": TEXT, "n_predict": 2000, "stream": True})
    connection.getresponse().read(50)
    connection.close()
    until = time.monotonic() + 30
    while any(slot["is_processing"] for slot in server.get("/slots")):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_context_shift_and_cache_reuse(mod):
    more = ("-np", "1", "--context-shift", "--cache-reuse", "16")
    with started(mod, "--ctx", "256", more=more) as server:
        long = ask(server, TEXT, n_predict=400, ignore_eos=True)
        assert long["truncated"] and long["tokens_predicted"] == 400
        trace = server.get("/mod/trace")
        assert len(trace["tokens"]) == trace["n_prompt"] + 399
        assert same_answer(ask(server, TEXT), anew(server, TEXT))
        words = tokens(server, TEXT * 3)[:200]
        ask(server, words)
        moved = ask(server, words[:20] + words[60:])  # 40 tokens are gone in the middle
        assert moved["content"] and moved["timings"]["prompt_n"] < 160
        # Moved K/V were computed with other tokens before them: the answer is not the same.
        assert same_answer(ask(server, TEXT, n_cache_reuse=0), anew(server, TEXT))
