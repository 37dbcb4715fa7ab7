"""The documentation and the code agree: links, commands, paths, the page of the commands and the
GGUF schema.
"""

import re
import shlex
from pathlib import Path

import click
import pytest

from mod_export.cli import cli
from mod_export.config import MoDConfig
from mod_export.formats import schema
from scripts.docs import cli as cli_page
from scripts.docs import training_memory

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "patches" / "README.md",
        *DOCS.rglob("*.md"),
        *(ROOT / "mod_export" / "assets").rglob("*.md"),
    ]
)
# The log keeps commands and paths as they were on the day of each entry.
CURRENT = [page for page in PAGES if page != DOCS / "log.md"]
CODE = ("mod_export", "scripts", "patches", "tests", ".ci")
BINARY = {".gz", ".npz", ".png", ".safetensors", ".gguf", ".pyc"}
# Folders whose paths are checked wherever a page names one.
CHECKED = r"(?:mod_export|scripts|tests|patches|docs|\.ci)"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """The text without code blocks and without code in lines, in which a bracket is no link."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    result: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (f"{slug}-{number}" if number else slug) in result:
            number += 1
        result.add(f"{slug}-{number}" if number else slug)
    return result


def code_lines(page: Path) -> list[str]:
    """The lines of all code blocks, fenced or indented, with continued lines joined."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()


def commands(page: Path, start: str) -> list[list[str]]:
    """The words that follow `start`, a pattern, in lines of code blocks."""
    result = []
    for line in code_lines(page):
        if found := re.search(rf"{start} (.+)", line):
            line = re.split(r" (?:&&|\||<) ", found.group(1))[0]
            result.append(shlex.split(re.sub(r"[][]|\"$", "", line), comments=True))
    return result


def parse(command: click.Command, words: list[str], context: click.Context) -> None:
    """Hold that each option exists, and that numbers and choices are among those allowed."""
    words = [word for word in words if word != "..." and not word.startswith("$")]
    values, _, _ = command.make_parser(context).parse_args(words)
    for option in command.params:
        value = values.get(option.name)
        plain = isinstance(value, str) and not re.fullmatch(r"[A-Z]+|.*\.\.\.", value)
        checked = (click.Choice, click.IntRange, click.FloatRange)
        if plain and isinstance(option.type, checked):
            option.type.convert(value, option, context)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_commands_parse(page):
    group = click.Context(cli, info_name="mod-export", **cli.context_settings)
    for words in commands(page, r"(?:^(?:\S*/)?mod-export|-m mod_export)"):
        if words[0].startswith("-"):
            cli.make_parser(click.Context(cli)).parse_args(words)
            continue
        command = cli.get_command(group, words[0])
        assert command is not None, words
        parse(command, words[1:], click.Context(command, info_name=words[0], parent=group))


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_options_of_the_scripts_exist(page):
    """Looked up in the source of a script: its import would take seconds."""
    for words in commands(page, r"python(?= -m scripts\.| scripts/)"):
        script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        source = (ROOT / script).read_text(encoding="utf-8")
        options = [word for word in words if word.startswith("--") and word != "--"]
        assert all(option in source for option in options), words


def test_page_of_the_commands_is_up_to_date():
    text = cli_page.PAGE.read_text(encoding="utf-8")
    assert text == cli_page.page(), "run python -m scripts.docs.cli"
    text = training_memory.PAGE.read_text(encoding="utf-8")
    assert text == training_memory.page(), "run python -m scripts.docs.training_memory"


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_paths_in_pages_exist(page):
    """Each file, folder and Python module of this repository that a page names is there."""
    text = page.read_text(encoding="utf-8")
    # a path whose first part follows another path, such as quickstart/mod, is not ours
    found = re.findall(rf"(?<![\w./-])({CHECKED}/[\w./-]*\w)", text)
    for module in re.findall(r"-m ((?:scripts|mod_export)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        found.append(str((path if path.is_dir() else path.with_suffix(".py")).relative_to(ROOT)))
    missing = {path for path in found if "NAME" not in path and not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_imports_in_pages_work(page):
    """The modules of `from mod_export... import ...` are there and have these names."""
    missing = []
    for module, names in re.findall(
        r"from (mod_export[\w.]*) import ([\w, ]+)", "\n".join(code_lines(page))
    ):
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for wanted in names.replace(" ", "").split(","):
            if not (re.search(rf"\b{wanted}\b", text) or (path / f"{wanted}.py").is_file()):
                missing.append(f"{module}.{wanted}")
    assert not missing


def test_pages_that_the_code_names_exist():
    dead = []
    for folder in CODE:
        for path in (ROOT / folder).rglob("*"):
            if not path.is_file() or path.suffix in BINARY or path == Path(__file__).resolve():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            for target in re.findall(r"(?<![\w./-])docs/[\w./-]*\w", text):
                if not (ROOT / target).exists():
                    dead.append(f"{name(path)}: {target}")
    assert not dead


def test_schema_document_names_every_key():
    """docs/reference/gguf-schema.md is the contract: it names what the code writes, and no more."""
    text = (DOCS / "reference" / "gguf-schema.md").read_text(encoding="utf-8")
    for key in [*schema.SCALARS, *schema.PER_UNIT]:
        assert f"mod.{key}`" in text or f"{{kind}}.{key}`" in text
    assert all(
        kind in text for kind in MoDConfig().to_dict() if kind in ("kv", "block", "attn", "ffn")
    )
    named = set(re.findall(r"`\{a\}\.mod\.(?:\{kind\}\.)?(\w+)`", text))
    assert named == {*schema.SCALARS, *schema.PER_UNIT}
    assert all(f"`{{a}}.mod.kv.{key}`" in text for key in schema.PER_UNIT | schema.OWN_WINDOWS)


def test_index_links_each_page():
    index = DOCS / "index.md"
    targets = re.findall(r"\]\(([^)#]+)", index.read_text(encoding="utf-8"))
    linked = {(DOCS / target).resolve() for target in targets}
    pages = set(DOCS.rglob("*.md")) - {index}
    assert not {name(page) for page in pages - linked}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
