"""The files of an adapter, read without torch.

An adapter is what makes a model a Mixture-of-Depths model, without the model itself. Its directory
holds

    mod.json             {"mod": the MoDConfig, "base": which model it is for (identity.py)}
    routers.safetensors  the routers, float32, under the names of a MoD directory
    adapter_config.json, adapter_model.safetensors    LoRA in PEFT's own format, where there is one
    README.md            for people

    found = read(resolve("smollm2-kv"))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats.base_identity import check
from mod_export.formats.hf_directory import Routers, read_json, read_routers

PACKAGED = Path(__file__).parent.parent / "assets/adapters"
MOD_JSON, ROUTERS = "mod.json", "routers.safetensors"
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
CURE = "get the adapter again"


@dataclass(frozen=True)
class Files:
    """What an adapter's directory says. base: as identity.base_identity gives it; lora: there are
    such weights.
    """

    config: MoDConfig
    routers: Routers
    base: dict
    lora: bool


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
    """An adapter's directory, given as such or as the name of a packaged one; None where `path` is
    neither.
    """
    if Path(path).exists():
        return Path(path) if is_adapter(path) else None
    return packaged(str(path))


def resolve(path: str | Path) -> Path:
    """The same where it has to be one: raises UserError."""
    if (found := find(path)) is not None:
        return found
    if Path(path).exists():
        raise UserError(
            f"{path} is no adapter: it has no {MOD_JSON}", "give the directory of an adapter"
        )
    known = ", ".join(packaged_names())
    raise UserError(
        f"no such adapter: {path}", f"give a directory{f', or one of {known}' if known else ''}"
    )


def read(path: Path) -> Files:
    """Everything but the LoRA weights, all checked. Raises UserError naming what is missing,
    damaged or unknown.
    """
    data = read_json(path / MOD_JSON, "give the directory of an adapter")
    if set(data) != {"mod", "base"}:
        raise UserError(f"{path / MOD_JSON} has not the keys mod and base", CURE)
    config, base = MoDConfig.from_dict(data["mod"]), check(data["base"], str(path / MOD_JSON))
    units = config.validate(base["n_layer"]).routed()
    if not units:
        raise UserError(f"{path} routes no unit", CURE)
    if not (path / ROUTERS).is_file():
        raise UserError(f"{path} has no {ROUTERS}", CURE)
    try:
        routers = read_routers([path / ROUTERS], units)
    except UserError as error:  # whose cure is for MoD directories
        raise UserError(error.message, CURE) from error
    if (width := len(routers[units[0]][0])) != base["n_embd"]:
        raise UserError(
            f"{path}: the routers have n_embd {width}, the model {base['n_embd']}", CURE
        )
    lora = [(path / name).is_file() for name in (LORA_CONFIG, LORA_WEIGHTS)]
    if any(lora) and not all(lora):
        raise UserError(f"{path} has no {(LORA_WEIGHTS if lora[0] else LORA_CONFIG)}", CURE)
    return Files(config, routers, base, all(lora))
