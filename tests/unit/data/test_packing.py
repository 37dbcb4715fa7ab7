"""Training data: packing, mixing, masks of answers, the cache, and what is said of bad files."""

import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from mod_export.common.files import locked
from mod_export.data import sources, token_cache
from mod_export.data.packing import open_data, order, split
from mod_export.data.repeats import PASSAGE
from mod_export.data.text import pack
from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer, with_bos

CHAT = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello\n\n  you 🐛 \n"},
    {"role": "user", "content": "And now? <b>"},
    {"role": "assistant", "content": "Ωmega, 12.5 % of it"},
]
DOCUMENTS = [f"Document {i}\n\n{TEXT[i * 100 : i * 100 + 300 + 40 * i]}" for i in range(12)]


@pytest.fixture
def opened(tmp_path):
    """opened(tokenizer, paths, length, ...) -> PackedData with a cache of the test's own."""

    def open_(tokenizer, *args, **kwargs):
        return open_data(tokenizer, *args, **{"cache": tmp_path / "cache"} | kwargs)

    return open_


def write(path: Path, content) -> Path:
    """Text, or a list of records as JSONL; gzipped where the name says so."""
    text = (
        content
        if isinstance(content, str)
        else "".join(json.dumps(record) + "\n" for record in content)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def all_ids(packed) -> torch.Tensor:
    return torch.stack([packed[i]["input_ids"] for i in range(len(packed))])


@pytest.mark.parametrize(
    "make", [byte_tokenizer, lambda: with_bos(byte_tokenizer()), tiny.tokenizer]
)
def test_packing_is_that_of_data_pack(make, opened, tmp_path):
    tokenizer = make()
    packed = opened(tokenizer, [write(tmp_path / "a.txt", TEXT)], 64)
    expected = pack(tokenizer, TEXT, 64)
    assert torch.equal(all_ids(packed), expected)
    assert packed.tokens == expected.numel()
    assert all(packed[i]["loss"].tolist() == [False] + [True] * 63 for i in range(len(packed)))


def test_documents_of_all_files_are_packed_in_the_mixed_order(opened, tmp_path):
    write(tmp_path / "in" / "a.txt", "\n\n\n".join(DOCUMENTS[:5]))
    write(
        tmp_path / "in" / "b" / "c.txt.gz",
        "\n\n\n\n\n" + "\r\n\r\n\r\n".join(DOCUMENTS[5:9]) + "\n",
    )
    write(tmp_path / "in" / "d.jsonl", [{"text": text, "id": 1} for text in DOCUMENTS[9:]])
    write(tmp_path / "in" / "README.md", "not this"), write(tmp_path / "in" / "e.csv", "nor this")
    write(tmp_path / "in" / ".f.txt", "nor this")
    pieces = [piece.text for piece in sources.Mixed(sources.find([tmp_path / "in"]))]
    assert sorted(pieces) == sorted(DOCUMENTS)
    assert pieces != DOCUMENTS
    packed = opened(byte_tokenizer(), [tmp_path / "in"], 50)
    assert torch.equal(all_ids(packed), pack(byte_tokenizer(), "\n\n\n".join(pieces), 50))
    again = opened(byte_tokenizer(), [tmp_path / "in"], 50, cache=tmp_path / "cache2")
    assert torch.equal(all_ids(packed), all_ids(again)) and packed.fingerprint == again.fingerprint


def test_long_documents_are_cut_at_paragraphs():
    paragraphs = [f"{i} " + "word " * 200 for i in range(100)]
    pieces = list(sources.cut(f"{p}\n\n".splitlines(True)[j] for p in paragraphs for j in (0, 1)))
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert len(pieces) > 5 and all(
        sources.PIECE <= len(p) < sources.PIECE + 1100 for p in pieces[:-1]
    )
    poem = list(sources.cut("no empty line\n" for _ in range(10000)))
    assert len(poem) > 1 and "\n".join(poem) == "\n".join(["no empty line"] * 10000)


def test_a_line_without_end_is_read_in_parts(tmp_path):
    text = "x" * (3 * sources.LONGEST + 5)
    assert [len(p.text) for p in sources.read(write(tmp_path / "a.txt", text))] == [
        sources.LONGEST
    ] * 3 + [5]


def test_every_prefix_holds_the_files_in_proportion():
    rng = np.random.default_rng(0)
    counts = [1000, 300, 20, 1]
    sizes = rng.integers(1, 100, sum(counts))
    files = np.repeat(range(4), counts)
    mixed = sources.mixed_order(sizes, counts)
    assert sorted(mixed) == list(range(sum(counts)))
    for part in (0.05, 0.3, 0.7):
        inside = mixed[np.cumsum(sizes[mixed]) <= part * sizes.sum()]
        for file in range(3):
            got, whole = sizes[inside][files[inside] == file].sum(), sizes[files == file].sum()
            assert abs(got - part * whole) <= 200, (part, file)
    first = mixed[files[mixed] == 0]
    assert (np.diff(first) == 1).mean() < 0.01  # and each file's pieces are shuffled


def answers_of(tokenizer, packed) -> str:
    """The marked tokens of the whole row: those that begin a sequence too, which count for nothing
    there.
    """
    ids, marks, _ = packed.source.read(0, packed.source.count)
    return tokenizer.decode(ids[marks])


def test_answers_are_the_assistants_words_and_the_end_of_turn(opened, tmp_path):
    tokenizer = tiny.tokenizer()
    path = write(
        tmp_path / "c.jsonl.gz", [{"messages": CHAT[:2]}, {"messages": CHAT}, {"text": TEXT}]
    )
    packed = opened(tokenizer, [path], 60, loss_on="answers")
    first, second = (f"{CHAT[i]['content']}<|im_end|>" for i in (1, 3))
    assert answers_of(tokenizer, packed) in (first + first + second, first + second + first)
    everything = opened(tokenizer, [path], 60)
    assert torch.equal(all_ids(packed), all_ids(everything))
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in (CHAT[:2], CHAT)]
    whole = tokenizer.decode(everything.source.read(0, everything.source.count)[0])
    assert all(text in whole for text in texts)
    for i in range(len(packed)):
        assert packed[i]["loss"].tolist() == [False, *packed.source.read(60 * i, 60)[1][1:]]
        assert everything[i]["loss"].sum() == 59


def test_what_is_said_again_is_not_novel(opened, tmp_path):
    tokenizer = tiny.tokenizer()
    path = write(tmp_path / "c.jsonl", [{"messages": [*CHAT[:2]]}] * 3)
    packed = opened(tokenizer, [path], 16)
    novel = torch.cat([packed[i]["novel"] for i in range(len(packed))])
    said = len(tokenizer.apply_chat_template(CHAT[:2], tokenize=True)["input_ids"])
    assert said > 2 * PASSAGE
    assert novel[: said - PASSAGE].all()
    assert not novel[said + PASSAGE - 1 :].any()


TEMPLATES = {  # template -> what the answers of CHAT are in it
    # no end of turn, a space before the answer, content stripped
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content.strip() }}</s>{% endif %}{% endfor %}": [
        " Hello\n\n  you 🐛</s>",
        " Ωmega, 12.5 % of it</s>",
    ],
    # reasoning in the last answer only, as in templates of reasoning models
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
    "<think></think>{% endif %}{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}": [
        CHAT[1]["content"] + "<end>",
        "<think></think>" + CHAT[3]["content"] + "<end>",
    ],
    # a generation prompt that no finished turn holds, and an answer that is among the user's words
    # too
    "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}{% if m.role == 'user' %} "
    + CHAT[1]["content"].strip()
    + "{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}": [
        "Hello\n\n  you 🐛<end>",
        "Ωmega, 12.5 % of it<end>",
    ],
    # no generation prompt, and the header is the template's word, so it is the model's too
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}": [
        "assistant: Hello\n\n  you 🐛",
        "assistant: Ωmega, 12.5 % of it",
    ],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_in_other_templates(template, opened, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    packed = opened(
        tokenizer, [write(tmp_path / "c.jsonl", [{"messages": CHAT}])], 2, loss_on="answers"
    )
    assert answers_of(tokenizer, packed) == "".join(TEMPLATES[template])


def test_offsets_without_spaces_make_the_same_marks(opened, tmp_path):
    """Many tokenizers leave the space before a word out of the word's offsets."""
    from tokenizers import processors

    path = write(tmp_path / "c.jsonl", [{"messages": CHAT[2:]}, {"messages": [CHAT[0], CHAT[3]]}])
    plain, trimmed = byte_tokenizer(), byte_tokenizer()
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for tokenizer in (plain, trimmed):
        tokenizer.chat_template = next(iter(TEMPLATES))
    marks = [
        t.read(0, t.count)[1]
        for t in (opened(x, [path], 8, loss_on="answers").source for x in (plain, trimmed))
    ]
    assert marks[0].tolist() == marks[1].tolist() and 0 < marks[0].sum() < len(marks[0])


class Untouchable:
    """A tokenizer that may be looked at but not used."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        raise AssertionError("tokenised again")


def test_the_cache_is_used(opened, tmp_path):
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.txt", TEXT)
    first = opened(tokenizer, [path], 64)
    moved = path.rename(tmp_path / "moved.txt")
    again = opened(Untouchable(tokenizer), [moved], 64)
    assert torch.equal(all_ids(first), all_ids(again)) and first.fingerprint == again.fingerprint
    other_length = opened(Untouchable(tokenizer), [moved], 32)
    assert other_length.fingerprint != first.fingerprint and len(other_length) >= 2 * len(first)
    for change in ({"limit": 500}, {"paths": [moved, moved]}):
        with pytest.raises(AssertionError):
            opened(Untouchable(tokenizer), **{"paths": [moved], "length": 64} | change)
    with pytest.raises(AssertionError):
        opened(Untouchable(with_bos(byte_tokenizer())), [moved], 64)
    write(moved, TEXT + "!")
    with pytest.raises(AssertionError):
        opened(Untouchable(tokenizer), [moved], 64)


def test_the_same_text_is_not_tokenised_twice_at_once(opened, tmp_path, caplog):
    path, found, cache = write(tmp_path / "a.txt", TEXT), [], tmp_path / "cache"
    whole = token_cache.tokens_of(byte_tokenizer(), [path], cache=tmp_path / "other")
    caplog.set_level(logging.INFO, "mod_export")
    waits = Thread(
        target=lambda: found.append(
            token_cache.tokens_of(Untouchable(byte_tokenizer()), [path], cache=cache)
        )
    )
    cache.mkdir()
    with locked(cache, busy=lambda: None):
        waits.start()
        while not caplog.messages:
            time.sleep(0.01)
        assert caplog.messages == ["another process tokenises; waiting for it"]
        shutil.copytree(whole.folder, cache / whole.folder.name)
    waits.join()
    assert found[-1].count == whole.count and [path.name for path in cache.iterdir()] == [
        whole.folder.name
    ]


def test_a_damaged_entry_is_made_again(opened, tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    first = opened(byte_tokenizer(), [path], 64)
    ids = all_ids(first)
    with open(first.source.folder / "ids.bin", "r+b") as file:
        file.truncate(100)
    assert torch.equal(all_ids(opened(byte_tokenizer(), [path], 64)), ids)


def test_a_failed_run_leaves_no_entry(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH", 200)
    write(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    write(
        tmp_path / "b.jsonl", [{"messages": CHAT}]
    )  # comes in the middle, and there is no chat template
    with pytest.raises(UserError, match="b.jsonl, line 1 is a conversation.*no chat template"):
        opened(byte_tokenizer(), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], 64)
    assert list((tmp_path / "cache").iterdir()) == []


KILLED = """
import sys, time; sys.path.insert(0, ".")
from tests.support.byte_tokenizer import byte_tokenizer
from mod_export import cli
from mod_export.data import token_cache
from mod_export.data.conversations import encode
cli.signal.signal(cli.signal.SIGTERM, lambda *_: sys.exit(1))
def slow(*args):
    print("working", flush=True)
    time.sleep(0.2)
    return encode(*args)
token_cache.conversations.encode, token_cache.BATCH = slow, 200
token_cache.tokens_of(byte_tokenizer(), [sys.argv[1]], cache=sys.argv[2])
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_entry(sign, opened, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    command = [sys.executable, "-c", KILLED, path, tmp_path / "cache"]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert process.stdout.readline() == "working\n" and process.stdout.readline() == "working\n"
    process.send_signal(sign)
    assert process.wait(30) != 0
    # A lock file is no entry: the system ends the lock of a killed process.
    left = [p.name for p in (tmp_path / "cache").iterdir() if p.name != ".lock"]
    assert left == [] if sign == signal.SIGTERM else all(name.endswith(".tmp") for name in left)
    whole = opened(byte_tokenizer(), [path], 64)
    novel = opened(byte_tokenizer(), [path], 64, cache=tmp_path / "novel")
    assert torch.equal(all_ids(whole), all_ids(novel))


def test_limit_takes_from_all_files_and_tokenises_little(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH", 2000)
    for i, letter in enumerate("abc"):
        write(tmp_path / "in" / f"{letter}.jsonl.gz", [{"text": letter * 98}] * 100 * (i + 1))
    seen = []
    encode = token_cache.conversations.encode
    monkeypatch.setattr(
        token_cache.conversations, "encode", lambda t, p, m: seen.extend(p) or encode(t, p, m)
    )
    tokenizer = byte_tokenizer()
    packed = opened(tokenizer, [tmp_path / "in"], 100, limit=6050)
    assert packed.source.count == 6050 and len(packed) == 60 and packed.tokens == 6000
    text = tokenizer.decode(all_ids(packed).flatten())
    assert [round(text.count(letter) / 980) for letter in "abc"] == [1, 2, 3]
    assert len(seen) < 100
    assert opened(tokenizer, [tmp_path / "in"], 100, limit=10**9).source.count == 60000


def test_split_is_even_and_complete(opened, tmp_path):
    packed = opened(byte_tokenizer(), [write(tmp_path / "a.txt", TEXT)], 50)
    train, held = split(packed, 7)
    assert sorted([*train.index, *held.index]) == list(range(len(packed)))
    gaps = np.diff([0, *held.index, len(packed)])
    assert (
        len(held) == 7
        and gaps[1:-1].min() >= len(packed) // 7
        and gaps[1:-1].max() <= len(packed) // 7 + 1
    )
    assert torch.equal(held[0]["input_ids"], packed[int(held.index[0])]["input_ids"])
    assert len({packed.fingerprint, train.fingerprint, held.fingerprint}) == 3
    assert split(packed, 7)[0].fingerprint == train.fingerprint
    assert (len(split(packed, 0)[0]), len(split(packed, 0)[1])) == (len(packed), 0)
    with pytest.raises(UserError, match=f"{len(packed)} of {len(packed)}"):
        split(packed, len(packed))


def test_order_is_a_permutation_that_depends_on_its_arguments_only():
    wanted = order(1000, 3, 5).tolist()
    assert sorted(wanted) == list(range(1000))
    order(1000, 3, 4), np.random.seed(1), np.random.rand(3)
    assert order(1000, 3, 5).tolist() == wanted
    assert wanted not in (
        order(1000, 3, 6).tolist(),
        order(1000, 5, 3).tolist(),
        order(1000, 4, 5).tolist(),
    )
    assert order(8, 0, 0).tolist() == [
        3,
        7,
        4,
        0,
        2,
        6,
        5,
        1,
    ]  # for good: a run may be resumed years later


def test_data_are_sent_to_worker_processes(opened, tmp_path):
    packed = opened(byte_tokenizer(), [write(tmp_path / "a.txt", TEXT)], 64)
    loader = torch.utils.data.DataLoader(
        packed, batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(next(iter(loader))["input_ids"], all_ids(packed)[:4])


BROKEN = gzip.compress(TEXT.encode())[:-20]
BAD = {  # name -> content, what is said
    "a.txt": (b"caf\xe9", "a.txt is not UTF-8 text"),
    "b.txt.gz": (BROKEN, "b.txt.gz is no gzip file, or a broken one"),
    "c.txt.gz": (b"plain", "c.txt.gz is no gzip file"),
    "d.jsonl": (b'{"text": "x"}\n{"text": \n', "d.jsonl, line 2: no JSON"),
    "e.jsonl": (
        b'{"text": "x"}\n\n{"question": "x"}\n',
        "e.jsonl, line 3: neither messages nor text",
    ),
    "f.jsonl": (b'["text"]', "f.jsonl, line 1: neither messages nor text"),
    "g.jsonl": (b'{"messages": []}', "g.jsonl, line 1: messages are not as they should be"),
    "h.jsonl": (b'{"messages": [{"role": "user", "content": [1]}]}', "line 1: messages are not as"),
    "i.jsonl": (b'{"text": "\\ud800"}', "i.jsonl, line 1: no JSON"),
    "j.txt": (b"short", r"data too short: 7 tokens where a sequence needs 64"),
    "k.txt": (b"", r"data too short: 0 tokens where a sequence needs 64"),
    "l.jsonl": (
        json.dumps({"messages": CHAT}).encode(),
        "l.jsonl, line 1 is a conversation, .*no chat template",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, opened, tmp_path):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        opened(byte_tokenizer(), [tmp_path / name], 64)


def test_bad_paths_and_options(opened, tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    (tmp_path / "empty").mkdir(), write(tmp_path / "empty" / "README.md", TEXT)
    for args, kwargs, said in (
        (([tmp_path / "none"], 64), {}, "none does not exist"),
        (([], 64), {}, "no data"),
        (([tmp_path / "empty"], 64), {}, "empty holds no text"),
        (([path], 1), {}, "length of 2"),
        (([path], 64), {"loss_on": "questions"}, "'questions' is unknown"),
        (([path], 64), {"loss_on": "answers"}, "no answers of an assistant"),
        (([path], 64), {"limit": 60}, "60 tokens where a sequence needs 64"),
        (([path], 64), {"cache": path}, "cannot create the cache directory"),
        (([path], 64), {"cache": "/proc/self"}, "cannot write to the cache directory"),
    ):
        with pytest.raises(UserError, match=said):
            opened(byte_tokenizer(), *args, **kwargs)


def test_a_template_that_refuses_is_quoted(opened, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "c.jsonl", [{"messages": CHAT}])
    with pytest.raises(
        UserError, match="c.jsonl, line 1: .*refuses this conversation: roles must alternate"
    ):
        opened(tokenizer, [path], 64)


def test_what_is_logged(tmp_path, caplog):
    start = time.monotonic()
    caplog.set_level(logging.INFO, "mod_export")
    tokenizer = tiny.tokenizer()
    paths = [write(tmp_path / "c.jsonl", [{"messages": CHAT}] * 9), write(tmp_path / "a.txt", TEXT)]
    for _ in range(2):
        packed = open_data(tokenizer, paths, 64, "answers", cache=tmp_path / "cache")
    assert caplog.messages[0] == caplog.messages[1] and time.monotonic() - start < 20
    assert (
        caplog.messages[0]
        == f"{packed.source.count} tokens from 2 files, {packed.source.answers} of them in answers"
    )
