"""Routers beside the model's file in llama-server and other tools: as in the file, to the bit."""

import os
import re
import subprocess

import pytest

from mod_export.export import export
from mod_export.formats import adapter_files
from mod_export.serving.llama_server import tools_folder
from tests.support.llama_server import started

PROMPT = {"prompt": "The lamp of a lighthouse", "n_predict": 12, "temperature": 0, "n_probs": 2}


@pytest.fixture(scope="module")
def routers(tmp_path_factory):
    path = tmp_path_factory.mktemp("beside") / "routers.gguf"
    return export(adapter_files.packaged("smollm2-kv"), path)


def run_tool(name: str, *options, routers=None) -> subprocess.CompletedProcess:
    folder = tools_folder()
    env = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    if routers:
        env["LLAMA_MOD_ADAPTER"] = str(routers)
    command = [str(folder / name), *map(str, options)]
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")


def test_the_server_is_that_of_the_routers_in_the_file(dense, shipped, routers):
    answers = []
    for model in ((shipped,), (dense, "--mod", routers)):
        with started(*model, "--ctx", "512") as server:
            units = server.get("/props")["mod"]["units"]
            answer = server.post("/completion", PROMPT)
            answers.append((units, answer["content"], answer["completion_probabilities"]))
    assert answers[0] == answers[1] and len(answers[0][0]) > 30


def test_other_tools_read_the_variable(dense, shipped, routers, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The lamp of a lighthouse turns all night. " * 60)
    options = ("-f", text, "-c", 256, "--chunks", 1, "-t", 2)
    inside = run_tool("llama-perplexity", "-m", shipped, *options)
    beside = run_tool("llama-perplexity", "-m", dense, *options, routers=routers)
    plain = run_tool("llama-perplexity", "-m", dense, *options)
    found = [
        re.search(r"PPL = [\d.]+ \+/- [\d.]+", done.stdout + done.stderr)[0]
        for done in (inside, beside, plain)
    ]
    assert found[0] == found[1] != found[2]
    bench = ("llama-bench", "-p", 16, "-n", 0, "-r", 1, "-v", "-m")  # it logs with -v only
    assert run_tool(*bench, dense, routers=routers).returncode == 0
    for tool in (bench, ("llama-cli", "-p", "Hi", "-n", 1, "-st", "-m")):
        refused = run_tool(*tool, shipped, routers=routers)
        assert refused.returncode == 1
        assert "error loading routers: the model has routers already" in refused.stderr
