"""Models by their names on the Hugging Face hub: the hub's own library, on a server of the test."""

from pathlib import Path

import pytest

from mod_export.errors import UserError
from mod_export.formats import hub
from mod_export.formats.hub import HubName
from tests.support import command_line
from tests.support.hub_server import TOKEN, HubServer, commit

NOBODY = 9  # the port at which no server listens
# The folder of the repository has more than a model needs.
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md", "chat.jinja")
MODEL_FILES += ("drafts.gguf",)  # of a MoD directory
OTHER_FILES = ("consolidated.safetensors", "onnx/model.onnx", "pytorch_model.bin", "picture.png")
GGUF_FILES = ("n-Q4_K_M.gguf", "n-Q8_0-00001-of-00002.gguf", "n-Q8_0-00002-of-00002.gguf")


def write(folder: Path, names) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    model = write(root / "model", MODEL_FILES + OTHER_FILES)
    repositories = {
        "org/model": model,
        "org/private": model,
        "org/gated": model,
        "org/name-GGUF": write(root / "gguf", (*GGUF_FILES, "mmproj-Q4_K_M.gguf", "README.md")),
        "org/pickled": write(root / "pickled", ("config.json", "pytorch_model.bin")),
        "org/code": write(root / "code", ("config.json", "main.py")),
    }
    with HubServer(repositories, private=["org/private"], gated=["org/gated"]) as running:
        yield running


@pytest.fixture
def locate(server, tmp_path, monkeypatch):
    """Run hub.locate. Returns the path, or the message of the error."""

    def run(name, revision=None, gguf=False, token="", offline=False, port=None):
        server.use(monkeypatch, tmp_path / "home", token, offline, port)
        try:
            return str(hub.locate(name, revision, gguf=gguf))
        except UserError as error:
            return str(error)

    return run


def files(folder: str) -> set[str]:
    root = Path(folder)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("hf.co/org/name-GGUF:Q4_K_M", HubName("org/name-GGUF", None, "Q4_K_M")),
        ("https://huggingface.co/org/name", HubName("org/name")),
        ("org/name@refs/pr/2:a/b.gguf", HubName("org/name", "refs/pr/2", "a/b.gguf")),
        ("model.gguf", None),
        ("folder/model.gguf", None),
        ("smollm2", None),
        ("./mod/model", None),
        ("/tmp/model", None),
        ("../mod", None),
        ("a/b/c", None),
    ],
)
def test_what_is_a_name_on_the_hub(text, name):
    assert hub.parse(text) == name


def test_a_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    assert hub.locate("org/model") == Path("org/model") and not hub.is_name("org/model")
    with pytest.raises(UserError, match="leave out --revision"):
        hub.locate("org/model", "main")


def test_a_snapshot_is_named_by_its_repository(tmp_path, monkeypatch):
    folder = tmp_path / "hub/models--org--a-model--v2/snapshots" / commit("x")
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (folder, folder / "model.gguf", ".", tmp_path / "link"):
        assert hub.repository(path) == "org/a-model--v2"
    assert hub.repository(tmp_path) is None


def test_a_model_comes_with_the_files_it_needs_and_stays_in_the_cache(locate, server):
    found = locate("org/model")
    assert files(found) == set(MODEL_FILES)
    assert hub.repository(found) == "org/model" and Path(found).name == commit("org/model")
    seen = len(server.requests)
    assert locate("org/model", offline=True) == found
    assert locate("org/model", port=NOBODY) == found
    assert len(server.requests) == seen
    assert locate("org/model@main", commit("org/model")).startswith("org/model@main names another")
    assert locate("org/model", commit("org/model")) == found
    # What a stopped run has left in the cache is no model.
    (Path(found) / "model.safetensors").unlink()
    assert "not whole in the hub's cache" in locate("org/model", offline=True)
    assert files(locate("org/model")) == set(MODEL_FILES)


def test_gguf_files_by_quantisation_and_by_name(locate):
    for gguf in (True, False):
        assert Path(locate("org/name-GGUF:q4_k_m", gguf=gguf)).name == "n-Q4_K_M.gguf"
    assert Path(locate("org/name-GGUF", gguf=True)).name == "n-Q4_K_M.gguf"
    found = Path(locate("org/name-GGUF:Q8_0"))
    assert found.name == GGUF_FILES[1] and (found.parent / GGUF_FILES[2]).is_file()
    assert locate(f"org/name-GGUF:{GGUF_FILES[1]}", offline=True) == str(found)
    assert "has no GGUF file Q2_K: n-Q4_K_M.gguf, n-Q8_0" in locate("org/name-GGUF:Q2_K")
    assert "name one, as in org/name-GGUF:Q4_K_M" in locate("org/name-GGUF")
    found = locate("org/model", gguf=True)
    assert (
        found
        == "org/model has no GGUF file; make one of it: mod-export convert org/model -o model.gguf"
    )


def test_pickled_weights_come_where_there_are_no_others(locate):
    assert files(locate("org/pickled")) == {"config.json", "pytorch_model.bin"}
    assert "it has no weights" in locate("org/code")


def test_a_token_opens_a_private_repository(locate):
    assert files(locate("org/private", token=TOKEN)) == set(MODEL_FILES)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("org/absent", {}, "no such repository that you may see; check the name"),
        ("org/private", {}, "for a private one run `hf auth login`, or set HF_TOKEN"),
        ("org/gated", {}, "org/gated is gated: its owner lets those in who have agreed"),
        ("org/model", {"revision": "v9"}, "org/model has no revision v9"),
        ("org/model", {"offline": True}, "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("org/model", {"port": NOBODY}, "cannot be reached"),
        ("org/name-GGUF:Q8_0", {"port": NOBODY}, "no such model: org/name-GGUF:Q8_0 is no file"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(locate, name, more, message):
    found = locate(name, **more)
    assert message in found and "\n" not in found


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    server.use(monkeypatch, tmp_path / "file")
    with pytest.raises(UserError, match="org/model cannot be stored: Not a directory.*set HF_HOME"):
        hub.locate("org/model")


def test_messages_call_a_snapshot_by_its_repository():
    folder = f"/tmp/my/hub/models--org--a-model--v2/snapshots/{commit('x')}"
    assert (
        hub.by_name(f"{folder}/m.gguf and {folder}") == "org/a-model--v2/m.gguf and org/a-model--v2"
    )


def test_a_command_leaves_nothing_where_the_hub_refuses(server, tmp_path):
    done = command_line.spawn(
        "convert", "org/gated", "-o", "mod", cwd=tmp_path, **server.environment(tmp_path / "home")
    )
    assert done.returncode == 2 and "error: org/gated is gated" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
