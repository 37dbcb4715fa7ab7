"""A failed assertion of llama.cpp is an exception, and the process goes on."""

import os
import signal
import sys
import threading
import time
from contextlib import closing

import pytest

from mod_export.errors import UserError
from mod_export.runtime import MoDLlama
from mod_export.runtime.assertions import AssertionFailure, guarded
from tests.support import tiny_vocab
from tests.support.bad_gguf import MODELS, write_edited
from tests.support.tiny_gguf import Tiny

import llama_cpp  # isort: skip


def test_what_a_call_returns_and_raises():
    assert guarded(lambda: 3) == 3
    with pytest.raises(KeyError):
        guarded(lambda: {}["a"])


def test_a_failed_assertion_is_an_exception(tmp_path):
    """Where a file has no vocabulary, llama.cpp asserts that one is there."""
    file = Tiny(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, n_ff=64).write(tmp_path / "none.gguf")
    with closing(MoDLlama(file, n_ctx=64)) as llm:
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        with pytest.raises(AssertionFailure, match=r"LLAMA_VOCAB_TYPE_NONE.*llama-vocab.cpp:\d+"):
            guarded(lambda: llama_cpp.llama_vocab_get_text(vocab, 0))


def test_the_next_file_opens(tmp_path, capfd):
    """The thread of the failed assertion waits for ever; what it hid is shown again."""
    edit, words, model = MODELS["experts in use where there are none"]
    bad = write_edited(tmp_path / "bad.gguf", edit, model=model)
    good = tiny_vocab.write(tmp_path / "good.gguf", model)
    for _ in range(3):
        with pytest.raises(UserError, match=words[0]):
            MoDLlama(bad, n_ctx=64)
        with closing(MoDLlama(good, n_ctx=64, threads=1)) as llm:
            assert llm("Hello", max_tokens=2)["usage"]["completion_tokens"] == 2
        os.write(1, b"out")
        print("err", file=sys.stderr)
        assert capfd.readouterr() == ("out", "err\n")


def test_an_interrupt_waits_for_the_call():
    """Ctrl-C counts when C++ has returned, as it does where nothing is guarded."""
    ended = threading.Event()

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        guarded(call)
    assert ended.is_set()
