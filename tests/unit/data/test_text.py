"""Text to sequences of tokens."""

import pytest

from mod_export.data.text import pack, read_texts
from mod_export.errors import UserError
from tests.support.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_texts_are_packed_whole_and_named_when_wrong(tokenizer, tmp_path):
    ids = pack(tokenizer, "ab\n\n\ncd", 8)
    assert tokenizer.decode(ids[0]) == "ab\n\ncd\n\n"
    with pytest.raises(UserError, match="text too short"):
        pack(tokenizer, "ab", 64)
    with pytest.raises(UserError, match="missing.txt"):
        read_texts([tmp_path / "missing.txt"])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.txt is not UTF-8"):
        read_texts([tmp_path / "binary.txt"])
