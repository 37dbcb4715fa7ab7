"""Export onto a file that is there, and bad input: all that needs no llama.cpp."""

import re
from pathlib import Path

import pytest

from mod_export.export import export, read_directory, write_routers
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.inspection import inspect
from tests.support.mod_files import assert_same_base, edited, export_refused, write_directory
from tests.support.tiny_gguf import Tiny

V01 = Path(__file__).parent.parent / "fixtures/v0.1"
UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("model") / "mod", UNITS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tiny = Tiny(n_layer=6, n_embd=64, n_head=2, n_ff=64)
    return tiny.write(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def mod_file(tmp_path_factory, mod_dir, base):
    path = tmp_path_factory.mktemp("out") / "mod.gguf"
    export(mod_dir, path, base=base)
    return path


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
    # Since then a file says more of itself.
    ours, theirs = (GGUFFile.open(path).keys for path in (tmp_path / "mod.gguf", written))
    added = [name for name in ours if name not in theirs]
    assert added and all(name.startswith("general.") for name in added)
    with (tmp_path / "less.gguf").open("wb") as file:
        rewrite(GGUFFile.open(tmp_path / "mod.gguf"), file, dropped_keys=added)
    assert (tmp_path / "less.gguf").read_bytes() == written.read_bytes()
    write_routers(GGUFFile.open(base), tmp_path / "again.gguf", *read_directory(V01 / "mod"))
    assert (tmp_path / "again.gguf").read_bytes() == written.read_bytes()


def test_dense_onto_a_base_is_the_base(tmp_path):
    base = without_routers(V01 / "mod-q8_0.gguf", tmp_path / "dense.gguf")
    export(V01 / "mod", tmp_path / "same.gguf", base=base, dense=True)
    assert (tmp_path / "same.gguf").read_bytes() == base.read_bytes()


def test_routers_on_an_existing_file(mod_dir, base, tmp_path):
    export(mod_dir, tmp_path / "mod.gguf", base=base)
    assert_same_base(tmp_path / "mod.gguf", base)


def test_a_folder_gives_the_file_its_name(run_cli, base, tmp_path):
    folder = write_directory(tmp_path / "mod", UNITS)
    (folder / "README.md").write_text("---\nbase_model: org/Tiny-Instruct\nlicense: mit\n---\n")
    (tmp_path / "out").mkdir()
    done = run_cli("export", folder, "--base", base, "-o", f"{tmp_path}/out/")
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == "Tiny-Instruct-MoD-kv-attn-ffn-F32.gguf" and str(written) in done.stdout
    keys = GGUFFile.open(written).keys
    assert keys["general.base_model.0.repo_url"].value == "https://huggingface.co/org/Tiny-Instruct"
    assert keys["general.license"].value == "mit"
    again = export_refused(run_cli, tmp_path, folder, "-o", f"{tmp_path}/out/", "--base", base)
    assert "exists already" in again


# --- bad input to export


def test_existing_output(run_cli, mod_dir, base, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    assert "--force" in export_refused(run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", base)
    assert (tmp_path / "out.gguf").read_text() == "mine"
    assert (
        run_cli(
            "export", mod_dir, "-o", "out.gguf", "--base", base, "--force", cwd=tmp_path
        ).returncode
        == 0
    )
    assert inspect(tmp_path / "out.gguf")["mod"]


def test_bases_that_do_not_fit(run_cli, mod_dir, base, mod_file, tmp_path):
    assert "no such file" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "none.gguf"
    )
    assert "routers already" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", mod_file
    )
    (tmp_path / "text.gguf").write_text("not a GGUF")
    assert "not a GGUF" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "text.gguf"
    )
    (tmp_path / "short.gguf").write_bytes(base.read_bytes()[:-500])
    assert "truncated" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "short.gguf"
    )
    Tiny(n_layer=6, n_embd=32).write(tmp_path / "narrow.gguf")
    assert "n_embd" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "narrow.gguf"
    )
    Tiny(n_layer=3, n_embd=64).write(tmp_path / "flat.gguf")
    assert "3 layers" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "flat.gguf"
    )


def test_outputs_that_cannot_be(run_cli, mod_dir, tmp_path):
    assert "no directory" in export_refused(run_cli, tmp_path, mod_dir, "-o", "none/out.gguf")
    (tmp_path / "folder").mkdir()
    assert "not a regular file" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "folder", "--force"
    )
    assert "quant" in export_refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--quant", "q3_14"
    )


def test_directories_that_are_no_mod_model(run_cli, mod_dir, tmp_path):
    assert "no such directory" in export_refused(run_cli, tmp_path, "none", "-o", "out.gguf")
    copy = edited(mod_dir, tmp_path / "copy", config=lambda data: data.pop("mod"))
    assert "no MoD model" in export_refused(run_cli, tmp_path, copy, "-o", "out.gguf")
    copy = edited(mod_dir, tmp_path / "copy", config=lambda data: data["mod"].update(kv_window=0))
    assert "kv_window" in export_refused(run_cli, tmp_path, copy, "-o", "out.gguf")
    (copy / "config.json").write_text("{")
    assert "no JSON" in export_refused(run_cli, tmp_path, copy, "-o", "out.gguf")


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("mamba", "'mamba' cannot have routers: .*no attention"),
        ("phi2", "'phi2' cannot have units of kind attn, ffn: .*; use kv or block units"),
        ("nonesuch", "'nonesuch' cannot have routers: .*does not know it"),
    ],
)
def test_architecture_that_cannot_have_the_routers(run_cli, mod_dir, tmp_path, architecture, said):
    tiny = Tiny(n_layer=6, n_embd=64, n_head=2, n_ff=64, arch=architecture)
    base = tiny.write(tmp_path / "base.gguf")
    assert re.search(
        said, export_refused(run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", base)
    )
    export(mod_dir, tmp_path / "dense.gguf", base=base, dense=True)


def test_architecture_of_a_directory(run_cli, mod_dir, tmp_path):
    """It is refused before the weights are converted."""
    directory = edited(
        mod_dir, tmp_path / "mamba", lambda data: data.update(architectures=["MambaForCausalLM"])
    )
    assert "'mamba' cannot have routers" in export_refused(
        run_cli, tmp_path, directory, "-o", "out.gguf"
    )
