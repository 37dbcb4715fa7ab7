"""Training data: packing, mixing, masks of answers, the cache, and what is said of bad files."""

import gzip
import json

import numpy as np
import pytest
import torch

from mod_export.data import sources
from mod_export.data.packing import order, split
from mod_export.data.repeats import PASSAGE
from mod_export.data.text import pack
from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer, with_bos
from tests.support.training_text import CHAT, DOCUMENTS, all_ids, write


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


def test_what_is_said_again_is_not_novel(opened, tmp_path):
    tokenizer = tiny.tokenizer()
    path = write(tmp_path / "c.jsonl", [{"messages": [*CHAT[:2]]}] * 3)
    packed = opened(tokenizer, [path], 16)
    novel = torch.cat([packed[i]["novel"] for i in range(len(packed))])
    said = len(tokenizer.apply_chat_template(CHAT[:2], tokenize=True)["input_ids"])
    assert said > 2 * PASSAGE
    assert novel[: said - PASSAGE].all()
    assert not novel[said + PASSAGE - 1 :].any()


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
    ]  # The order never changes: a run may be resumed years later.


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
        (([path], 64), {"cache": "/proc/self"}, "cannot write /proc/self/.lock.*MOD_EXPORT_CACHE"),
    ):
        with pytest.raises(UserError, match=said):
            opened(byte_tokenizer(), *args, **kwargs)
