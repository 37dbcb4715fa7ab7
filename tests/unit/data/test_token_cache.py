"""The token cache: used, made again when damaged, whole or not there."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch

from mod_export.common.files import locked
from mod_export.data import token_cache
from mod_export.data.packing import open_data
from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer, with_bos
from tests.support.training_text import CHAT, DOCUMENTS, all_ids, write


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
