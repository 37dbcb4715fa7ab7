"""MoDLlama stands in for llama_cpp.Llama: every public name of the pinned version, called rightly
and wrongly; what llama_cpp.Llama has wrong; copies, threads, streams, closed objects, the hub.

Calls that could end the process have processes of their own, see support/drop_in.py.
"""

import copy
import inspect
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from mod_export.config import MoDConfig, UnitConfig
from mod_export.errors import UserError
from mod_export.export import write_routers
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import MoDLlama
from tests.support import drop_in
from tests.support.drop_in import OPTIONS, PROMPT, RIGHT, WRONG, evaluated, taken
from tests.support.hub_server import HubServer
from tests.support.short_smollm2 import short_smollm2
from tests.support.tiny_gguf import Tiny

N_LAYER = 3
ROUTED = {"kv": (1, 2), "ffn": (1,)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A dense file, and a MoD file with routers of random weights."""
    folder = tmp_path_factory.mktemp("files")
    dense, mod = folder / "dense.gguf", folder / "mod.gguf"
    short_smollm2(dense, N_LAYER)
    rng = np.random.default_rng(0)
    units, routers = {}, {}
    for kind, layers in ROUTED.items():
        half = [0.5 * (layer in layers) for layer in range(N_LAYER)]
        units[kind] = UnitConfig(tuple(half), tuple(1 - x for x in half))
        for layer in layers:
            weight = rng.standard_normal(576, np.float32) / 24
            routers[layer, kind] = weight, np.array([0.5], np.float32)
    write_routers(GGUFFile.open(dense), mod, MoDConfig(kv_window=16, units=units), routers)
    return {"dense": dense, "mod": mod}


def test_closing_prints_nothing(tmp_path, capfd):
    """llama.cpp warned of compute buffers that had grown for pieces of graphs."""
    path = Tiny().route([2, 3], "kv").write(tmp_path / "mod.gguf")
    exact = {"flash_attn": False, "type_k": 0, "type_v": 0}
    llm = MoDLlama(path, n_ctx=1024, n_batch=1024, logits_all=True, **exact)
    llm.eval([1] * 1000)
    llm.new_context(n_ctx=1024)
    llm.eval([1] * 1000)
    llm.close()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def outcomes(files) -> dict:
    return {
        (which, name): drop_in.run_calls(which, path)
        for name, path in files.items()
        for which in ("theirs", "ours")
    }


@pytest.fixture(scope="module")
def mod(files):
    return MoDLlama(files["mod"], **OPTIONS)


# --- every public name of llama_cpp.Llama


def test_every_public_name_has_cases():
    """A name that a later version of llama_cpp.Llama adds needs cases here first."""
    names = {name for name in dir(llama_cpp.Llama) if not name.startswith("_")}
    own = {"__call__", "__getstate__", "__setstate__"}
    assert set(RIGHT) == names | own
    assert set(WRONG) >= names | own


@pytest.mark.parametrize("name", [name for name, calls in RIGHT.items() if calls])
@pytest.mark.parametrize("file", ["dense", "mod"])
def test_right_calls_give_what_they_give_in_llama_cpp(outcomes, file, name):
    for index in range(len(RIGHT[name])):
        theirs = outcomes["theirs", file]["right"][name, index]
        ours = outcomes["ours", file]["right"][name, index]
        assert "error" not in (theirs if isinstance(theirs, dict) else {}), theirs
        assert ours == theirs, (name, index)


@pytest.mark.parametrize("name", [name for name, calls in WRONG.items() if calls])
@pytest.mark.parametrize("file", ["dense", "mod"])
def test_wrong_calls_are_a_user_error_and_leave_the_object_usable(outcomes, file, name):
    ended = [outcomes["ours", file]["wrong"].get((name, i)) for i in range(len(WRONG[name]))]
    assert ended == ["UserError"] * len(ended)


def test_a_refused_batch_says_why(files):
    llm = MoDLlama(
        files["mod"], **OPTIONS, attention_type=llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL
    )
    with pytest.raises(UserError, match="can only be decoded, with causal attention"):
        llm.eval([1, 2])
    with pytest.raises(UserError, match="cannot open .*: must be real number, not str; check the"):
        MoDLlama(files["mod"], **OPTIONS, tensor_split=["a"])


# --- names and copies


def test_both_names_of_an_argument(files):
    llm = MoDLlama(files["dense"], threads=1, n_ctx=64)
    same = MoDLlama(model_path=str(files["dense"]), n_threads=1, n_threads_batch=2, n_ctx=64)
    assert (llm.n_threads, llm.n_threads_batch) == (1, 1)
    assert (same.n_threads, same.n_threads_batch) == (1, 2)
    assert same.model_path == llm.model_path
    with pytest.raises(UserError, match="threads is 1 and n_threads 2; give one of them"):
        MoDLlama(files["dense"], threads=1, n_threads=2)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_keep_the_settings(files, copied):
    llm = MoDLlama(files["mod"], **OPTIONS | {"flash_attn": False}, seed=3)
    llm.shift, llm.force, llm.kv_rollback, llm.stop = 0.3, "active", 7, True
    llm.set_threshold(1, 0.625)
    other = copied(llm)
    for name in ("shift", "force", "kv_rollback", "stop", "thresholds", "n_batch", "_seed"):
        assert getattr(other, name) == getattr(llm, name), name
    assert not other.__getstate__()["flash_attn"] and other.n_ctx() == llm.n_ctx()
    assert not other._adaptive_threads  # a number of threads was given
    llm.close()
    other.stop, other.force = False, "none"
    assert len(taken(other, PROMPT)) == 6


# --- what llama_cpp.Llama has wrong


TEXTS = ["Hello", "a lighthouse on a rock", "World"]


@pytest.mark.parametrize("pooling", drop_in.POOLINGS)
@pytest.mark.parametrize("file", ["dense", "mod"])
def test_embeddings_of_a_list_are_those_of_its_texts(files, file, pooling):
    """llama_cpp.Llama reads wrong rows for the second text and later ones with pooling none."""
    options = OPTIONS | {"embedding": True, "pooling_type": drop_in.POOLINGS[pooling]}
    llm = MoDLlama(files[file], **options)
    each = [llm.embed(text) for text in TEXTS]
    together, count = llm.embed(TEXTS, return_count=True)
    assert count == sum(len(llm.tokenize(text.encode())) for text in TEXTS)
    for one, other in zip(each, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-2)
    assert llm.embed([]) == []
    assert [d["embedding"] for d in llm.create_embedding(TEXTS)["data"]] == together
    for vector in llm.embed(TEXTS, normalize=True):
        np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), 1, rtol=1e-5)


def test_embeddings_are_the_last_hidden_state(files):
    """Times the output matrix they are the logits; pooled they are its mean, first and last row."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    rows = {}
    for pooling, number in drop_in.POOLINGS.items():
        llm = MoDLlama(files["dense"], **OPTIONS, embedding=True, pooling_type=number)
        rows[pooling] = np.array(llm.embed(PROMPT))
    tensors = {t.name: t for t in GGUFReader(files["dense"]).tensors}
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    some = slice(0, 4000)  # tokens; dequantising all takes seconds
    logits = rows["none"] @ dequantize(output.data[some], output.tensor_type).T
    exact = evaluated(MoDLlama(files["dense"], **OPTIONS, logits_all=True))
    np.testing.assert_allclose(logits, exact.scores[: exact.n_tokens, some], atol=0.3)
    for pooling, expected in {
        "mean": rows["none"].mean(0),
        "cls": rows["none"][0],
        "last": rows["none"][-1],
    }.items():
        np.testing.assert_allclose(rows[pooling], expected, atol=1e-2)


def test_a_text_that_is_computed_in_parts_is_pooled_whole(files):
    """llama_cpp.Llama gives the mean of the last n_ubatch tokens."""
    options = OPTIONS | {"embedding": True, "pooling_type": drop_in.POOLINGS["mean"]}
    text = "word " * 40
    whole = MoDLlama(files["dense"], **options)
    parts = MoDLlama(files["dense"], **options, n_ubatch=32)
    tokens = len(parts.tokenize(text.encode()))
    assert parts.embed(text, return_count=True)[1] == 32 < tokens
    np.testing.assert_allclose(
        parts.embed(text),
        whole.embed(whole.detokenize(whole.tokenize(text.encode())[:32]).decode()),
        atol=1e-2,
    )


def test_pieces_of_more_than_32_bytes(mod):
    """llama_cpp.Llama loses them."""
    long = [t for t in range(mod.n_vocab()) if len(mod.piece(t)) > 32]
    assert long
    for token in long:
        assert mod.detokenize([token]) == mod.piece(token)


def test_a_bias_and_processors_together(mod):
    """llama_cpp.Llama loses both."""
    seen = []

    def process(_ids, logits):
        seen.append(len(logits))
        return logits

    answer = mod(
        PROMPT, max_tokens=1, temperature=0.0, logit_bias={77: 1e4}, logits_processor=[process]
    )
    assert answer["choices"][0]["text"] == mod.detokenize([77]).decode()
    assert seen == [mod.n_vocab()]


def test_errors_of_processors_and_criteria_reach_the_caller(mod):
    """ctypes prints those of processors, and llama_cpp.Llama goes on."""

    def fails(_ids, _logits):
        raise KeyError("a mistake of the caller's own")

    before = taken(mod, PROMPT)
    for options in ({"logits_processor": [fails]}, {"stopping_criteria": [fails]}):
        with pytest.raises(KeyError, match="caller's own"):
            mod(PROMPT, **options)
        assert taken(mod, PROMPT) == before


@pytest.mark.parametrize("logits_all", [False, True])
def test_criteria_get_the_logits_of_the_token(files, logits_all):
    """llama_cpp.Llama gives those of the first token, or memory that nobody wrote."""
    llm, seen = MoDLlama(files["dense"], **OPTIONS, logits_all=logits_all), []

    def watch(_ids, logits):
        seen.append(int(logits.argmax()))
        return len(seen) == 4

    answer = taken(llm, PROMPT, temp=0.0, stopping_criteria=[watch])
    assert seen[:3] == answer and len(seen) == 4
    assert int(np.argmax(llm.eval_logits[-1])) == seen[3]


def test_sampling_parameters_hold_after_a_generation(mod):
    """llama_cpp.Llama goes on with the sampler of the generation."""
    taken(mod, PROMPT, temp=5.0, top_k=0, top_p=1.0, min_p=0.0)
    assert {evaluated(mod).sample(temp=0.0) for _ in range(3)} == {taken(mod, PROMPT)[0]}


def test_all_logits_of_a_context_that_is_rounded_up(files):
    """llama.cpp rounds 100 up to 256, and llama_cpp.Llama has rows for 100."""
    llm = MoDLlama(files["dense"], **OPTIONS | {"n_ctx": 100}, logits_all=True)
    llm.eval([5] * 200)
    assert llm.n_ctx() == 256 and len(llm.eval_logits) == 200


# --- streams, threads, closed objects

IN_A_PROCESS = {
    "two threads": """
        alone = [llm(p, **GREEDY)["choices"][0]["text"] for p in (PROMPT, OTHER)]
        found = {}
        def work(number, prompt):
            found[number] = [llm(prompt, **GREEDY)["choices"][0]["text"] for _ in range(3)]
        run([(work, 0, PROMPT), (work, 1, OTHER)])
        assert found == {0: alone[:1] * 3, 1: alone[1:] * 3}, found
    """,
    "two streams in two threads": """
        alone = [taken(llm, PROMPT), taken(llm, OTHER)]
        found = {}
        def work(number, prompt):
            found[number] = taken(llm, prompt)
        run([(work, 0, PROMPT), (work, 1, OTHER)])
        assert found == dict(enumerate(alone)), found
    """,
    "streams that take turns": """
        alone = [taken(llm, PROMPT), taken(llm, OTHER)]
        streams = [llm.generate(llm.tokenize(p.encode()), temp=0.0) for p in (PROMPT, OTHER)]
        turns = [[next(stream) for stream in streams] for _ in range(6)]
        assert [list(tokens) for tokens in zip(*turns)] == alone, (turns, alone)
    """,
    "calls within a stream": """
        alone = taken(llm, PROMPT)
        stream = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
        found = [next(stream)]
        for call in (
            lambda: llm(OTHER, **GREEDY), llm.reset, lambda: llm.eval([5, 6]), lambda: llm.sample(),
            lambda: llm.load_state(llm.save_state()),
        ):
            call()
            found.append(next(stream))
        assert found == alone, (found, alone)
    """,
    "a stream that is dropped": """
        alone = taken(llm, PROMPT)
        dropped = llm(OTHER, stream=True)
        next(dropped)
        kept = llm(OTHER, stream=True)
        next(kept)
        del dropped
        found = []
        run([(lambda: found.extend(taken(llm, PROMPT)),)])
        assert found == alone
        kept.close()
    """,
    "a stream that two threads read": """
        alone = taken(llm, PROMPT, 12)
        stream, found = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0), []
        def work():
            for _ in range(6):
                while True:
                    try:
                        found.append(next(stream))
                        break
                    except ValueError:  # Python's own: generator already executing
                        time.sleep(0.001)
        run([(work,), (work,)])
        assert sorted(found) == sorted(alone), (found, alone)
    """,
    "a closed object": """
        stream = llm(PROMPT, stream=True)
        next(stream)
        tokenizer, other = llm.tokenizer(), llm.generate([1, 2])
        llm.close()
        llm.close()
        calls = [lambda: next(stream), lambda: next(other), lambda: tokenizer.tokenize(b"a")]
        for name in dir(MoDLlama):
            if name.startswith("_") or name in ("close", "errors_kept", "from_pretrained"):
                continue
            if isinstance(inspect.getattr_static(MoDLlama, name), staticmethod):
                continue
            calls.append(functools.partial(use, name))
        for call in calls:
            try:
                call()
            except UserError as exc:
                assert str(exc) == "the model is closed; open the file again", exc
            else:
                raise AssertionError(f"{call} worked")
    """,
    "a close while another thread writes": """
        seen, inside, closing, closed = [], *(threading.Event() for _ in range(3))
        def process(_ids, logits):  # The third token is computed while the other thread closes.
            if len(seen) == 2:
                inside.set()
                closing.wait(50)
                time.sleep(0.1)
            return logits
        def work():
            prompt = llm.tokenize(PROMPT.encode())
            try:
                for token in llm.generate(prompt, temp=0.0, logits_processor=[process]):
                    seen.append(token)
                    if len(seen) == 3:
                        closed.wait(50)
            except UserError as exc:
                seen.append(str(exc))
        def close():
            inside.wait(50)
            closing.set()
            llm.close()
            closed.set()
        run([(work,), (close,)])
        assert len(seen) == 4, seen
        assert seen[-1].startswith("the model is closed"), seen
    """,
}

START = """
    import functools, inspect, sys, threading, time
    from mod_export.errors import UserError
    from mod_export.runtime import MoDLlama
    from tests.support.drop_in import GREEDY, OPTIONS, OTHER, PROMPT, taken

    llm = MoDLlama(sys.argv[1], **OPTIONS)

    def run(tasks):
        threads = [threading.Thread(target=task[0], args=task[1:]) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "the threads wait for each other"

    def use(name):
        member = getattr(llm, name)  # a property refuses here
        parameters = inspect.signature(member).parameters.values()
        return member(*[1 for p in parameters if p.default is p.empty and p.kind < 2])
"""


@pytest.mark.parametrize("what", IN_A_PROCESS)
def test_in_a_process(files, what):
    code = textwrap.dedent(START) + textwrap.dedent(IN_A_PROCESS[what])
    command = [sys.executable, "-X", "faulthandler", "-c", code, files["mod"]]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_ours_are_guarded_too():
    """What a MoDLlama adds goes through the same guard as what it inherits."""
    for name, member in inspect.getmembers_static(MoDLlama):
        if name.startswith("_") or isinstance(member, staticmethod | classmethod):
            continue
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function) and name not in ("close", "errors_kept"):
            assert function.__code__.co_filename.endswith("guard.py"), name


# --- the hub


def test_a_file_of_the_hub(files, tmp_path, monkeypatch):
    """The hub's own library, on a server that speaks as much of the hub's API as it asks for."""
    folder = tmp_path / "repository"
    (folder / "parts").mkdir(parents=True)
    for name in ("parts/model-q8_0.gguf", "parts/model-q4_0.gguf"):
        shutil.copy(files["mod"], folder / name)

    def refused(*args):
        with pytest.raises(UserError) as error:
            MoDLlama.from_pretrained(*args)
        return str(error.value)

    with HubServer({"org/name": folder}) as hub:
        hub.use(monkeypatch, tmp_path / "home")
        llm = MoDLlama.from_pretrained("org/name", "*q8_0.gguf", n_ctx=64, n_threads=1)
        assert llm.units and llm.n_ctx() == 256, llm.n_ctx()
        place = tmp_path / "local"
        local = MoDLlama.from_pretrained(
            "org/name", "*q4_0.gguf", additional_files=["*q8*"], local_dir=place, n_ctx=64
        )
        assert Path(local.model_path) == place / "parts/model-q4_0.gguf"
        assert (place / "parts/model-q8_0.gguf").exists()
        assert "several files match" in refused("org/name", "*.gguf")
        assert "no file matches" in refused("org/name", "*.bin")
        assert "org/name has no file none.gguf" in refused("org/name", "none.gguf")
    hub.use(monkeypatch, tmp_path / "home", offline=True)
    again = MoDLlama.from_pretrained("org/name", "parts/model-q8_0.gguf", n_ctx=64)
    assert again.model_path == llm.model_path
    assert "and HF_HUB_OFFLINE is set" in refused("org/name", "*q8_0.gguf")
