"""Which MoD files have a dense file without their routed layers as their floor."""

import pytest

from mod_export.benchmark.floor import block_floor, prune
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from tests.support.tiny_gguf import Tiny


def test_which_files_have_a_pruned_floor(tmp_path):
    def floor(tiny: Tiny):
        return block_floor(GGUFFile.open(tiny.write(tmp_path / "x.gguf")))

    assert floor(Tiny().route([2, 4], "block")) == {2, 4}
    assert floor(Tiny().route([2, 4], "block+kv")) == {2, 4}
    assert floor(Tiny().route([2], "block").route([3], "kv")) is None
    assert floor(Tiny().route([2], "attn")) is None
    assert floor(Tiny()) is None
    with pytest.raises(UserError, match="has 5 layers, no layer 7"):
        prune(GGUFFile.open(Tiny().write(tmp_path / "x.gguf")), tmp_path / "y.gguf", {2, 7})
    assert not (tmp_path / "y.gguf").exists()
