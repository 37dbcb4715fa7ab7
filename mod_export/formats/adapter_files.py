"""The files of an adapter, read without torch.

An adapter is what makes a model a Mixture-of-Depths model, without the model itself. Its directory
holds

    mod.json             {"mod": the MoDConfig, "base": which model it is for (base_identity.py),
                          "model": where that was found}
    routers.safetensors  the routers, float32, under the names of a MoD directory
    adapter_config.json, adapter_model.safetensors    LoRA in PEFT's own format, where there is one
    README.md            for people

    found = read(resolve("smollm2-kv"))
    weights_of("smollm2-kv")                     # the path of its model, from mod.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import hf_directory, hub
from mod_export.formats.base_identity import ADAPTER_AGAIN, check
from mod_export.formats.schema import Routers

PACKAGED = Path(__file__).parent.parent / "assets/adapters"
MOD_JSON = "mod.json"
ROUTERS = "routers.safetensors"
LORA_CONFIG = "adapter_config.json"  # PEFT's name
LORA_WEIGHTS = "adapter_model.safetensors"  # PEFT's name
GIVE_ADAPTER = "give the directory of an adapter"


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's directory says.

    base: identity of the model that the adapter is for (base_identity.py)
    lora: whether the directory holds LoRA weights
    model: where its base was found, as hub.locate takes it; '' where that is not noted
    """

    config: MoDConfig
    routers: Routers
    base: dict
    lora: bool
    model: str = ""


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is the directory of an adapter (in whatever state)."""
    return (Path(path) / MOD_JSON).is_file()


def packaged(name: str) -> Path | None:
    """The directory of an adapter that comes with mod-export."""
    return PACKAGED / name if name in packaged_names() else None


def packaged_names() -> list[str]:
    """Names of the adapters that come with mod-export."""
    return sorted(path.name for path in PACKAGED.glob("*") if is_adapter(path))


def find(path: str | Path) -> Path | None:
    """An adapter's directory, from its path or the name of a packaged adapter; None for neither."""
    if Path(path).exists():
        return Path(path) if is_adapter(path) else None
    return packaged(str(path))


def resolve(path: str | Path) -> Path:
    """Find the adapter like `find`, but raise UserError where `path` is no adapter."""
    if (found := find(path)) is not None:
        return found
    if Path(path).exists():
        raise UserError(f"{path} is no adapter: it has no {MOD_JSON}", GIVE_ADAPTER)
    known = ", ".join(packaged_names())
    cure = f"give a directory, or one of {known}" if known else "give a directory"
    raise UserError(f"no such adapter: {path}", cure)


def read(path: Path) -> AdapterFiles:
    """Everything but the LoRA weights, all checked.

    Raises UserError naming what is missing, damaged or unknown.
    """
    data = hf_directory.read_json(path / MOD_JSON, GIVE_ADAPTER)
    if set(data) - {"model"} != {"mod", "base"} or not isinstance(data.get("model", ""), str):
        raise UserError(
            f"{path / MOD_JSON} has not the keys mod and base, or model is no text", ADAPTER_AGAIN
        )
    config = MoDConfig.from_dict(data["mod"])
    base = check(data["base"], str(path / MOD_JSON))
    routers = _read_routers(path, config, base)
    has_config = (path / LORA_CONFIG).is_file()
    has_weights = (path / LORA_WEIGHTS).is_file()
    if has_config != has_weights:
        missing = LORA_WEIGHTS if has_config else LORA_CONFIG
        raise UserError(f"{path} has no {missing}", ADAPTER_AGAIN)
    return AdapterFiles(config, routers, base, lora=has_config, model=data.get("model", ""))


def weights_of(path: str | Path, base: str | Path | None = None) -> Path:
    """Return the path of what has the weights of an adapter or a MoD directory.

    base: of an adapter, where it is not the model that the adapter names. A directory has its own.
    Raises UserError where it is not there, or not needed.
    """
    if (adapter := find(path)) is None:
        if base is not None:
            raise UserError(f"{path} holds the weights of its model", "leave out --base")
        return Path(path)
    if base is not None:
        found = hub.locate(base, gguf=None)
        if not found.exists():
            raise UserError(
                f"no such model: {base}", "give a directory or a GGUF file of the model"
            )
        return found
    model = read(adapter).model
    if not model:
        raise UserError(f"{path} does not name its model", "give the model as --base")
    found = hub.locate(model, gguf=None)
    if not found.exists():
        raise UserError(f"the model of {path} is no longer at {model}", "give it as --base")
    return found


def _read_routers(path: Path, config: MoDConfig, base: dict) -> Routers:
    units = config.validate(base["n_layer"]).routed()
    if not units:
        raise UserError(f"{path} routes no unit", ADAPTER_AGAIN)
    if not (path / ROUTERS).is_file():
        raise UserError(f"{path} has no {ROUTERS}", ADAPTER_AGAIN)
    try:
        routers = hf_directory.read_routers([path / ROUTERS], config)
    except UserError as error:  # its cure is for MoD directories
        raise UserError(error.message, ADAPTER_AGAIN) from error
    width = len(routers[units[0]][0])
    if width != base["n_embd"]:
        raise UserError(
            f"{path}: the routers have n_embd {width}, the model {base['n_embd']}", ADAPTER_AGAIN
        )
    return routers
