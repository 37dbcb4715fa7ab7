"""Routers in a file of their own, beside the file of a dense model.

The model is the one that has the same routers in its file, to the bit.
"""

import copy
import os
import pickle
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.evaluation.open import open_pair
from mod_export.export import export
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.inspection import inspect
from mod_export.runtime import bindings
from mod_export.runtime.llama import MoDLlama, StateMismatchError
from mod_export.runtime.opening import check_opens
from mod_export.units import units_of
from tests.support.mutated_gguf import KINDS, OF_VOCABULARY, mutate
from tests.support.oracle import TOKENS, make
from tests.support.routers_beside import needs_routers_beside, write_adapter
from tests.support.tiny_gguf import Tiny

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

pytestmark = needs_routers_beside

OPTIONS = {"n_ctx": 256, "threads": 1, "logits_all": True}


def write(folder, tiny):
    """The model's file with its routers, the file without them, and the routers' own file."""
    with_routers = tiny.write(folder / "mod.gguf")
    base = replace(tiny, routers={}, windows={}, tensors={}).write(folder / "base.gguf")
    adapter = write_adapter(folder / "adapter", with_routers, base)
    return with_routers, base, export(adapter, folder / "routers.gguf")


@pytest.fixture(scope="module", params=["all", "heads with windows"])
def files(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("beside"), make(request.param, vocab=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """mod.gguf, base.gguf, routers.gguf and adapter/ of a model with units of all kinds."""
    path = tmp_path_factory.mktemp("all")
    write(path, make("all", vocab=True))
    return path


def bias_of(routers) -> tuple[str, np.ndarray]:
    tensors = GGUFFile.open(routers).tensors
    name = next(name for name in tensors if name.endswith(".bias"))
    return name, tensors[name].array()


def changed(source, target, keys=(), dropped=(), tensors=None):
    file = GGUFFile.open(source)
    added = [(name, file.keys[name].type, value) for name, value in keys]
    with open(target, "wb") as out:
        rewrite(
            file,
            out,
            added_keys=added,
            dropped_keys=[*dropped, *(name for name, _ in keys)],
            kept_tensors={n: n for n in file.tensors if n not in (tensors or {})},
            added_tensors={n: v for n, v in (tensors or {}).items() if v is not None},
        )
    return target


def read(llm) -> tuple:
    llm.reset()
    with llm.recording() as batches:
        llm.eval(TOKENS[0])
    return llm.scores[: llm.n_tokens].copy(), *batches[0], llm.kv()


def same(a: tuple, b: tuple) -> None:
    for ours, theirs in zip(a[:-1], b[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (a[-1].cells_used, a[-1].used) == (b[-1].cells_used, b[-1].used)


def test_it_is_the_model_with_the_routers_in_its_file(files):
    """Logits, decisions, K/V and states, of copies too; without the routers it is dense."""
    path, base, routers = files
    inside, beside, dense = (
        MoDLlama(path, **OPTIONS),
        MoDLlama(base, mod=routers, **OPTIONS),
        MoDLlama(base, **OPTIONS),
    )
    assert units_of(beside.units) == units_of(inside.units) and not dense.units
    assert beside.thresholds == inside.thresholds
    expected = read(inside)
    same(read(beside), expected)
    assert 0.1 < beside.activation() < 0.9
    assert not np.array_equal(read(dense)[0], expected[0])
    beside.force = "active"
    assert np.abs(read(beside)[0] - read(dense)[0]).max() < 0.2
    for other in (copy.deepcopy(beside), pickle.loads(pickle.dumps(beside))):
        assert (other.mod, other.force) == (str(routers), "active")
        other.force = "none"
        same(read(other), expected)
        other.close()
    for llm in (inside, beside, dense):
        llm.close()


def test_states_go_on_beside_the_same_routers_only(files, tmp_path):
    """A state belongs to the routers, wherever they lie: in the file or beside it."""
    path, base, routers = files
    name, bias = bias_of(routers)
    other_bias = changed(routers, tmp_path / "changed.gguf", tensors={name: bias + 1})
    inside, beside = MoDLlama(path, **OPTIONS), MoDLlama(base, mod=routers, **OPTIONS)
    inside.eval(TOKENS[0])
    state = inside.save_state()
    beside.load_state(state)
    for llm in (inside, beside):
        llm.eval(TOKENS[1][:20])
    np.testing.assert_array_equal(beside.last_logits(), inside.last_logits())
    for other in (MoDLlama(base, mod=other_bias, **OPTIONS), MoDLlama(base, **OPTIONS)):
        with pytest.raises(StateMismatchError):
            other.load_state(state)
        with pytest.raises(StateMismatchError):
            other.load_state(beside.save_state())
        other.close()
    for llm in (inside, beside):
        llm.close()


def test_commands_take_routers_beside_the_file(folder, run_cli, tmp_path):
    done = run_cli("export", "adapter", "-o", tmp_path / "routers.gguf", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "routers.gguf").read_bytes() == (folder / "routers.gguf").read_bytes()
    shown = run_cli("inspect", "routers.gguf", cwd=folder).stdout
    assert "routers alone, to be put beside a file of tiny" in shown and "schema 1" in shown
    beside = inspect(folder / "base.gguf", str(folder / "routers.gguf"))
    assert beside["mod"] == inspect(folder / "mod.gguf")["mod"]
    chat = ("chat", "--raw", "--prompt", "Two", "-n", 8, "--temperature", 0, "--threads", 1)
    answers = [
        run_cli(*chat, *model, cwd=folder)
        for model in (
            ["mod.gguf"],
            ["base.gguf", "--mod", "routers.gguf"],
            ["base.gguf", "--mod", "adapter"],
        )
    ]
    assert [done.returncode for done in answers] == [0] * 3, answers
    assert len({done.stdout for done in answers}) == 1 and answers[0].stdout.strip()
    assert all("activation" in done.stderr for done in answers)
    picture = tmp_path / "depth.svg"
    model = ("base.gguf", "--mod", "adapter")
    done = run_cli("trace", *model, "--prompt", "Two", "-o", picture, cwd=folder)
    assert done.returncode == 0 and picture.is_file(), done.stderr


def test_readers_of_eval_take_routers_beside_the_file(folder):
    pairs = [
        open_pair(folder / "mod.gguf", threads=1),
        open_pair(folder / "base.gguf", threads=1, mod=str(folder / "adapter")),
    ]
    for inside, beside in zip(*(pair.readers().values() for pair in pairs), strict=True):
        assert beside.config == inside.config
        ours, theirs = (reader.read(TOKENS[0].tolist(), True) for reader in (beside, inside))
        np.testing.assert_array_equal(ours, theirs)


# --- what is refused


def open_model(path):
    params = llama_cpp.llama_model_default_params()
    return _internals.LlamaModel(path_model=str(path), params=params, verbose=False)


def test_refusals(folder, tmp_path):
    """One line each. The library refuses what Python has let pass, and Python what it can tell."""
    base, routers = folder / "base.gguf", folder / "routers.gguf"
    (tmp_path / "text.gguf").write_text("no GGUF file")
    (tmp_path / "cut.gguf").write_bytes(routers.read_bytes()[:-300])
    lora = tmp_path / "lora.gguf"
    Tiny(vocab=True).lora(lora)
    other = Tiny(vocab=True, seed=5).write(tmp_path / "other.gguf")
    deeper = Tiny(vocab=True, n_layer=6).write(tmp_path / "deeper.gguf")
    sliding = Tiny(vocab=True, sliding=(1,)).write(tmp_path / "sliding.gguf")
    name, bias = bias_of(routers)
    cases = [
        (base, tmp_path / "none.gguf", "no such file"),
        (base, tmp_path / "none", "no such adapter"),
        (base, tmp_path / "text.gguf", "is not a GGUF file"),
        (base, tmp_path / "cut.gguf", "truncated"),
        (base, base, "holds no routers to be put beside a model"),
        (base, lora, "holds no routers to be put beside a model"),
        (folder / "mod.gguf", routers, "routers already; leave out the routers beside it"),
        (other, routers, "for tiny, and the model of the same shape has other weights"),
        (deeper, routers, "for tiny with block_count 5, the model has 6; give the model that"),
        (sliding, routers, "for tiny of architecture 'llama', the model has 'granite_swa'"),
    ]
    for kind, options, words in (
        ("tensor", {"tensors": {name: None}}, f"{name} is missing"),
        ("nan", {"tensors": {name: bias * np.nan}}, "not finite"),
        ("more", {"tensors": {"blk.1.attn_q.weight": bias}}, "attn_q.weight is no router's"),
        ("key", {"dropped": ["llama.mod.version"]}, "llama.mod.version is missing"),
        ("type", {"keys": [("adapter.type", "lora")]}, "holds no routers"),
    ):
        cases.append((base, changed(routers, tmp_path / f"{kind}.gguf", **options), words))
    for model, mod, words in cases:
        with pytest.raises(UserError) as error:
            MoDLlama(model, mod=mod, **OPTIONS)
        assert words in str(error.value) and "\n" not in str(error.value), error.value
    with pytest.raises(UserError, match="the model of the same shape has other weights"):
        check_opens(other, "get it again", routers)  # as `serve` does before the server starts
    check_opens(base, "get it again", routers)


def test_the_library_refuses_a_second_file_and_a_model_in_use(folder):
    """Python checks neither, as C programs do not."""
    model = open_model(folder / "base.gguf")
    put = bindings.llama_mod_adapter_load
    path, refused = str(folder / "routers.gguf").encode(), -4
    assert put(model.model, b"/no/such/file") == refused
    assert put(model.model, str(folder / "base.gguf").encode()) == refused
    context = _internals.LlamaContext(
        model=model, params=llama_cpp.llama_context_default_params(), verbose=False
    )
    assert put(model.model, path) == refused
    context.close()
    assert bindings.llama_mod_n_units(model.model) == 0
    assert put(model.model, path) == 0
    assert bindings.llama_mod_n_units(model.model) > 0
    assert put(model.model, path) == refused
    model.close()


def opened(base, routers) -> bool:
    """Whether MoDLlama takes the routers; where it does not, one line has to say why."""
    try:
        MoDLlama(base, mod=routers, n_ctx=256, threads=1).close()
    except UserError as error:
        return "\n" in str(error)
    return True


def test_damaged_files_are_refused(folder, tmp_path):
    """Python and the library alone, which reads them in llama-server, live through all of them."""
    data, damaged = (folder / "routers.gguf").read_bytes(), tmp_path / "damaged.gguf"
    refused = dict.fromkeys(KINDS.keys() - set(OF_VOCABULARY), 0)
    for kind, number in product(refused, range(12)):
        damaged.write_bytes(mutate(data, kind, number))
        model = open_model(folder / "base.gguf")
        by_library = bindings.llama_mod_adapter_load(model.model, os.fsencode(damaged))
        model.close()
        is_open = opened(folder / "base.gguf", damaged)
        assert not (is_open and by_library), (kind, number)
        refused[kind] += not is_open
    hits = {kind for kind, count in refused.items() if count > 2}
    assert hits >= refused.keys() - {"bytes of routers", "bytes of the tail"}, refused
