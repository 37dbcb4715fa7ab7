#!/usr/bin/env python3
"""Turn the patches into an edited tree of llama.cpp and back, without loss of a byte.

    python scripts/patches/refresh.py TREE           make TREE: base, overlay, a commit per patch
    python scripts/patches/refresh.py --fold TREE    put uncommitted edits into their commits
    python scripts/patches/refresh.py --write TREE   write overlay/, *.patch and series from TREE
    python scripts/patches/refresh.py --check        demand complete headers and the same bytes

The subject of a patch's commit is the patch's name without its number (`memory-kv-cache-mod`), and
the body is the patch's header. `--write` puts each new file into the overlay, whichever commit adds
it. `--write` puts changes to upstream's files into the patch of their commit.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mod_export.errors import UserError
from mod_export.llamacpp import source as llama_source

ROOT = "vendor/llama.cpp"  # The source distribution has llama.cpp here.
PATCHES = Path(__file__).resolve().parents[2] / "patches"
FIELDS = {"Description": r"\S.* : .+", "Author": r".+", "Forwarded": r"not-needed|\w+://\S+"}
FIELDS |= {"Last-Update": r"\d{4}-\d\d-\d\d", "X-Test": r".+"}
OPTIONAL = {"X-Test"}
SERIES_HEAD = (
    "# The patches in the order in which they apply; written by scripts/patches/refresh.py\n"
)
# everything that a user's configuration could change in a diff is fixed here
DIFF_COMMAND = [
    "diff",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--no-renames",
    "--unified=1",
    "--inter-hunk-context=0",
    "--diff-algorithm=myers",
    "--indent-heuristic",
    "--src-prefix=a/",
    "--dst-prefix=b/",
]
IDENTITY = [
    "-c",
    "user.name=mod-export",
    "-c",
    "user.email=mod-export@localhost",
    "-c",
    "commit.gpgsign=false",
]


def git(tree: Path, *args: str, text: str | None = None, editor: str = "false") -> str:
    """Run git in `tree` apart from the user's and any outer repository's configuration."""
    env = os.environ | {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_EDITOR": editor,
    }
    env |= {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    env |= {"GIT_SEQUENCE_EDITOR": editor}
    command = ["git", *IDENTITY, "-c", "core.autocrlf=false", "-c", "core.quotePath=false", *args]
    result = subprocess.run(
        command, cwd=tree, env=env, input=text and text.encode(), capture_output=True
    )
    # decoded here because text mode would turn \r\n into \n
    out, err = (
        stream.decode("utf-8", "surrogateescape") for stream in (result.stdout, result.stderr)
    )
    if result.returncode != 0:
        raise UserError(f"git {args[0]} failed in {tree}: {err.strip() or out.strip()}")
    return out


def encode(text: str) -> bytes:
    """The bytes that `git` has decoded."""
    return text.encode("utf-8", "surrogateescape")


def create(tree: Path, sdist: Path | None = None, only: set[str] | None = None) -> None:
    """Make `tree` from the pinned source, or the files `only` of it, and patches/."""
    if tree.exists() and any(tree.iterdir()):
        raise UserError(f"{tree} exists already and is not empty", "remove it or choose another")
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as tmp:
        files = only and {f"{ROOT}/{name}" for name in only}
        llama_source.unpack(llama_source.fetch_sdist(sdist), Path(tmp), files)
        Path(tmp, ROOT).rename(tree)
    git(tree, "init", "--quiet", "--initial-branch=main")
    # upstream's unused parts are not unpacked; keep them out where somebody copies them in
    (tree / ".git/info/exclude").write_text(
        "/models\n/docs\n/media\n/benches\n/tools/ui\n/build*\n"
    )
    commit(tree, f"llama.cpp {llama_source.read_pin(PATCHES).commit}")
    llama_source.copy_overlay(tree, PATCHES)
    commit(tree, "overlay")
    for patch in llama_source.read_series(PATCHES):
        llama_source.git_apply(tree, patch)
        commit(tree, f"{patch.stem.partition('-')[2]}\n\n{read_header(patch)}")


def commit(tree: Path, message: str) -> None:
    """Commit everything in the tree, files that upstream's .gitignore names included."""
    git(tree, "add", "--all", "--force")
    # verbatim: a header's bytes are the patch's bytes
    git(
        tree,
        "commit",
        "--quiet",
        "--allow-empty",
        "--no-verify",
        "--cleanup=verbatim",
        "--file=-",
        text=message,
    )


def read_header(patch: Path) -> str:
    """The text before the line `---`, with its newline."""
    header, line, _ = patch.read_text(encoding="utf-8").partition("---\n")
    if not line:
        raise UserError(f"{patch.name} has no line '---' after its header")
    return header


def check_header(name: str, header: str) -> None:
    """Demand the fields of FIELDS, each once; lines that begin with a space continue a field."""
    fields: dict[str, str] = {}
    for line in header.splitlines():
        field, colon, value = line.partition(": ")
        if line.startswith(" ") and fields:
            fields[list(fields)[-1]] += line
        elif colon and field in FIELDS and field not in fields:
            fields[field] = value
        else:
            raise UserError(
                f"{name}: unexpected line in the header: {line!r}",
                f"the fields are {', '.join(FIELDS)}",
            )
    for field, pattern in FIELDS.items():
        if field not in fields and field not in OPTIONAL:
            raise UserError(f"{name}: the header has no {field}", "add it to the commit's message")
        if field in fields and not re.fullmatch(pattern, fields[field]):
            raise UserError(f"{name}: {field} is {fields[field]!r}", f"it should match {pattern}")


def history(tree: Path) -> list[str]:
    """Commits of the tree, oldest first: base, overlay, patches."""
    commits = git(tree, "rev-list", "--reverse", "--first-parent", "HEAD").split()
    if len(commits) < 2:
        raise UserError(f"{tree} holds no commits for base and overlay", "make it with this script")
    return commits


def names(tree: Path, *args: str) -> list[str]:
    """The paths that a git command prints."""
    return [name for name in git(tree, *args, "-z").split("\0") if name]


def write(tree: Path, patches: Path) -> None:
    """Write overlay, patches and series of `tree`'s commits into `patches`.

    An error leaves everything untouched.
    """
    if dirty := names(tree, "diff", "--name-only", "HEAD") + names(
        tree, "ls-files", "--others", "--exclude-standard"
    ):
        raise UserError(
            f"{tree} has uncommitted changes ({dirty[0]}, {len(dirty)} in all)",
            "commit or --fold them",
        )
    base, *commits = history(tree)
    upstream = set(names(tree, "ls-tree", "-r", "--name-only", base))
    texts = patch_texts(tree, base, commits, upstream)
    shutil.rmtree(patches / "overlay", ignore_errors=True)
    for name in names(tree, "ls-tree", "-r", "--name-only", "HEAD"):
        if name not in upstream:
            (patches / "overlay" / name).parent.mkdir(parents=True, exist_ok=True)
            (patches / "overlay" / name).write_bytes(encode(git(tree, "show", f"HEAD:{name}")))
    for old in patches.glob("[0-9]*.patch"):
        old.unlink()
    for name, text in texts.items():
        (patches / name).write_bytes(encode(text))
    (patches / "series").write_text(SERIES_HEAD + "".join(f"{name}\n" for name in texts))


def patch_texts(tree: Path, base: str, commits: list[str], upstream: set[str]) -> dict[str, str]:
    """File name -> text, for every commit that changes files of upstream."""
    texts, parent = {}, base
    for commit_id in commits:
        changed = sorted(upstream & set(names(tree, "diff", "--name-only", parent, commit_id)))
        if changed:
            subject, _, header = git(tree, "log", "-1", "--format=%B", commit_id).partition("\n\n")
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", subject):
                raise UserError(
                    f"commit subject {subject!r} is no patch name",
                    "use words like memory-kv-cache-mod",
                )
            header = header.rstrip("\n") + "\n"
            check_header(subject, header)
            diff = git(tree, *DIFF_COMMAND, parent, commit_id, "--", *changed)
            diff = re.sub(
                r"^index .*\n", "", diff, flags=re.MULTILINE
            )  # they name blobs, which say nothing here
            texts[f"{len(texts) + 1:04}-{subject}.patch"] = f"{header}---\n{diff}"
        parent = commit_id
    return texts


def fold(tree: Path) -> None:
    """Put each uncommitted edit into the last commit that touches its file.

    New files go into the overlay commit.
    """
    base, overlay, *_ = history(tree)
    upstream = set(names(tree, "ls-tree", "-r", "--name-only", base))
    git(tree, "add", "--all")
    owners: dict[str, list[str]] = {}
    for name in names(tree, "diff", "--cached", "--name-only", "HEAD"):
        owner = git(tree, "log", "-1", "--format=%H", f"{overlay}..HEAD", "--", name).strip()
        if name in upstream and not owner:
            raise UserError(
                f"no patch changes {name} yet", "commit it, with the name and header of its patch"
            )
        owners.setdefault(owner or overlay, []).append(name)
    before = git(tree, "rev-parse", "HEAD").strip()
    for owner, paths in owners.items():
        git(tree, "commit", "--quiet", "--no-verify", f"--fixup={owner}", "--", *paths)
    try:
        git(tree, "rebase", "--quiet", "--interactive", "--autosquash", base, editor="true")
    except UserError:
        git(tree, "rebase", "--abort")
        git(tree, "reset", "--soft", before)  # the edits are uncommitted again, as they were
        raise


def touched(patches: Path) -> set[str]:
    """Upstream's files that the patches change."""
    texts = [patch.read_text(encoding="utf-8") for patch in llama_source.read_series(patches)]
    return {name for text in texts for name in re.findall(r"^--- a/(.+)$", text, re.MULTILINE)}


def check(sdist: Path | None = None) -> None:
    """Make patches -> tree -> patches in a temporary folder, and compare.

    Raises UserError where headers or bytes differ from what they are.

    The tree holds only the files that the patches change: the others would take ten times as long
    and change nothing.
    """
    for patch in llama_source.read_series(PATCHES):
        check_header(patch.name, read_header(patch))
    with tempfile.TemporaryDirectory() as tmp:
        tree, again = Path(tmp, "tree"), Path(tmp, "patches")
        create(tree, sdist, only=touched(PATCHES) | {"LICENSE"})
        again.mkdir()
        write(tree, again)
        ours, theirs = contents(PATCHES), contents(again)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"patches/{name} changes in a round trip", "write it again with --write"
            )


def contents(patches: Path) -> dict[str, bytes]:
    """Path -> bytes of what `write` writes."""
    files = [*(patches / "overlay").rglob("*"), *patches.glob("*.patch"), patches / "series"]
    return {str(path.relative_to(patches)): path.read_bytes() for path in files if path.is_file()}


def sizes(patches: Path) -> str:
    """One line per patch and one for the overlay: lines added and removed."""
    lines = []
    for patch in llama_source.read_series(patches):
        body = patch.read_text(encoding="utf-8").partition("---\n")[2]
        added, removed = (
            len(re.findall(rf"^{sign}(?!{sign}{sign} )", body, re.MULTILINE))
            for sign in (r"\+", "-")
        )
        lines.append(f"{patch.name}: +{added} -{removed}")
    overlay = llama_source.overlay_files(patches)
    total = sum((patches / "overlay" / name).read_bytes().count(b"\n") for name in overlay)
    return "\n".join([*lines, f"overlay: {len(overlay)} files, {total} lines"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, nargs="?", metavar="TREE")
    parser.add_argument("--sdist", type=Path, help="source distribution that is here already")
    action = parser.add_mutually_exclusive_group()
    for name in ("fold", "write", "check"):
        action.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    if (args.tree is None) != args.check:
        parser.error("name a TREE, or use --check alone")
    try:
        if args.check:
            check(args.sdist)
        elif args.fold:
            fold(args.tree)
        elif args.write:
            write(args.tree, PATCHES)
        else:
            create(args.tree, args.sdist)
        print(sizes(PATCHES))
    except UserError as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
