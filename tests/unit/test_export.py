"""Export onto a file that is there, without llama.cpp."""

from pathlib import Path

import pytest

from mod_export.export import export, read_directory, write_routers
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile, rewrite

V01 = Path(__file__).parent.parent / "fixtures/v0.1"


def without_routers(source: Path, target: Path) -> Path:
    """The dense file that version 0.1 put the routers on."""
    file = GGUFFile.open(source)
    start = schema.prefix(file.architecture)
    with target.open("wb") as out:
        rewrite(
            file,
            out,
            dropped_keys=[name for name in file.keys if name.startswith(start)],
            kept_tensors={
                name: name for name in file.tensors if not schema.ROUTER_TENSOR.fullmatch(name)
            },
        )
    return target


@pytest.mark.parametrize("name", ["mod-f32", "mod-q8_0"])
def test_the_bytes_are_those_of_version_0_1(tmp_path, name):
    written = V01 / f"{name}.gguf"
    base = without_routers(written, tmp_path / "dense.gguf")
    assert schema.from_keys(GGUFFile.open(base)) is None
    export(V01 / "mod", tmp_path / "mod.gguf", base=base)
    assert (tmp_path / "mod.gguf").read_bytes() == written.read_bytes()
    write_routers(base, tmp_path / "again.gguf", *read_directory(V01 / "mod"))
    assert (tmp_path / "again.gguf").read_bytes() == written.read_bytes()


def test_dense_onto_a_base_is_the_base(tmp_path):
    base = without_routers(V01 / "mod-q8_0.gguf", tmp_path / "dense.gguf")
    export(V01 / "mod", tmp_path / "same.gguf", base=base, dense=True)
    assert (tmp_path / "same.gguf").read_bytes() == base.read_bytes()
