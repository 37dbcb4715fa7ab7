"""Which graph builders of llama.cpp keep the rules by which the patched library cuts a graph.

    python -m scripts.patches.builders            # compares with builders.json, exit code 1
    python -m scripts.patches.builders --write    # writes builders.json

The library builds a range of layers and cuts where upstream's callbacks name a tensor
(docs/explanation/runtime-design.md). A builder keeps the rules where

    its layer loops are written as all others are,
    each has one build_cvec(), at its end (or the file has, where functions build the halves),
    each names the stream between attention and FFN once, right behind the addition,
    and no tensor is made before a loop and used in it, inputs apart.

The check reads the pinned source with the patches applied. It compares files with each other; what
an architecture can do is decided when it runs. After a change of the pinned source, a builder that
is not in the list any more is one to look at.
"""

import json
import re
import sys
import tarfile
import tempfile
from pathlib import Path

from mod_export.llamacpp import source as llama_source

TABLE = Path(__file__).with_suffix(".json")
MODELS = "src/models"
LOOP = "for (int il = 0; il < n_layer; ++il) {"
TAILS = (
    'build_cvec(cur, il); cb(cur, "l_out", il); inpL = cur; }',
    'build_cvec(inpL, il); cb(inpL, "l_out", il); }',
)
# names of the stream between attention and FFN, where it is not ffn_inp
MIDDLES = {
    "gemma": "sa_out",
    "gemma2": "sa_out",
    "gemma3": "sa_out",
    "bailingmoe2": "sa_out",
    "gemma4": "attn_out",
    "qwen3next": "attn_residual",
    "qwen35": "attn_residual",
    "qwen35moe": "attn_residual",
    "plamo2": "attn_residual",
    "plamo3": "attn_residual",
}
# the stream, and inputs of the graph, which each range of layers makes anew
MADE_ANEW = re.compile(r"cur|inpL|inp_pos|inp_attn\w*|inp_out_ids")
NO_LOOP, NO_MIDDLE = "no loop over layers", "the stream between attention and FFN has no name"


def check(name: str, code: str) -> list[str]:
    """The rules that the builder `name` breaks; none where it keeps all."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", code, flags=re.S)
    starts = [match.start() for match in re.finditer(re.escape(LOOP), code)]
    if not starts:
        return [NO_LOOP]
    broken: list[str] = []
    for start in starts:
        body = _braced(code, start + len(LOOP) - 1)
        before = code[_constructor(code, start) : start]
        helpers = "build_cvec(" not in body  # functions of the same file build the halves
        broken += _check_loop(name, code[start:] if helpers else body, before, helpers)
    return list(dict.fromkeys(broken))


def _check_loop(name: str, body: str, before: str, helpers: bool) -> list[str]:
    broken = []
    if body.count("build_cvec(") != 1:
        broken.append(f"{body.count('build_cvec(')} calls of build_cvec")
    elif not helpers and re.sub(r"\s+", " ", body[body.index("build_cvec(") :]) not in TAILS:
        broken.append("the stream changes behind build_cvec")
    middle = MIDDLES.get(name, "ffn_inp")
    named = re.findall(rf'(\w+)\s*=\s*[^;]*;\s*cb\((\w+), "{middle}", il\);', body)
    if not re.search(rf'"{middle}"', body):
        broken.append(NO_MIDDLE)
    elif len(named) != 1 or body.count(f'"{middle}"') != 1 or named[0][0] != named[0][1]:
        broken.append(f"{middle} is not named once, right behind its addition")
    made = set(re.findall(r"ggml_tensor\s*\*\s*(\w+)\s*[=;]", before))
    made |= set(re.findall(r"auto\s*\*?\s*(\w+)\s*=\s*build", before))
    made |= set(re.findall(r"llm_graph_input\w*\s*\*\s*(\w+)\s*=", before))
    made = {variable for variable in made if not MADE_ANEW.fullmatch(variable)}
    carried = sorted(variable for variable in made if re.search(rf"\b{variable}\b", body))
    if carried:
        broken.append(f"made before the loop and used in it: {', '.join(carried)}")
    return broken


def _braced(code: str, start: int) -> str:
    """The text from the brace at `start` to the one that closes it."""
    depth = 0
    for end in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[end], 0)
        if depth == 0:
            return code[start : end + 1]
    raise ValueError("a brace is not closed")


def _constructor(code: str, end: int) -> int:
    starts = re.finditer(r"::graph(?:<\w+>)?::graph\(|::graph\(", code[:end])
    return max((match.start() for match in starts), default=0)


def read(root: Path) -> dict[str, str]:
    """Code of each builder in `root`, a vendor/llama.cpp."""
    files = sorted((root / MODELS).glob("*.cpp"))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def patched(folder: Path) -> dict[str, str]:
    """Code of each builder of the pinned source with the patches applied, unpacked in `folder`."""
    only = _paths() | {f"{llama_source.LLAMA_CPP}/{path}" for path in _touched()}
    llama_source.unpack(llama_source.fetch_sdist(), folder, only)
    root = folder / llama_source.LLAMA_CPP
    llama_source.apply_patches(root)
    return read(root)


def _paths() -> set[str]:
    with tarfile.open(llama_source.fetch_sdist()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    start = f"{llama_source.LLAMA_CPP}/{MODELS}/"
    return {name for name in names if name.startswith(start)}


def _touched() -> set[str]:
    """Upstream's files that the patches change."""
    return {
        path
        for patch in llama_source.read_series()
        for path in re.findall(r"^--- a/(\S+)", patch.read_text(encoding="utf-8"), flags=re.M)
    }


def table(builders: dict[str, str]) -> dict:
    """What builders.json holds: names that keep the rules, and the broken rules of the others."""
    broken = {name: check(name, code) for name, code in builders.items()}
    return {
        "keep": [name for name, rules in broken.items() if not rules],
        "break": {name: "; ".join(rules) for name, rules in broken.items() if rules},
    }


def main() -> int:
    """Run the command line."""
    with tempfile.TemporaryDirectory() as folder:
        found = table(patched(Path(folder)))
    text = json.dumps(found, indent=1) + "\n"
    if "--write" in sys.argv[1:]:
        TABLE.write_text(text, encoding="utf-8")
        return 0
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    for name in sorted(set(known["keep"]) - set(found["keep"])):
        print(f"{name}: {found['break'].get(name, 'is gone')}")
    return int(found != known)


if __name__ == "__main__":
    sys.exit(main())
