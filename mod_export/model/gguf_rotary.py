"""Whether a GGUF file turns queries and keys as a Hugging Face configuration does.

added = additions(Path("mod"), config, GRAPHS["llama"], GGUFFile.open("written.gguf"))
same(Path("mod"), config, GRAPHS["llama"], GGUFFile.open("base.gguf"))
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.rotary import (
    FREQS,
    LONG,
    SHORT,
    SLIDING,
    Rotary,
    SlidingRotary,
    file_rotary,
    plain_angles,
)
from mod_export.model.gguf_graphs import Graph

logger = logging.getLogger(__name__)

COMMON_CURE = "use it in torch; a GGUF file of it would compute something else"
FULL, SLIDES = "full_attention", "sliding_attention"


@dataclass
class Additions:
    """Keys (name, type, value), keys to drop, and tensors that a file lacks."""

    keys: list[tuple[str, str, object]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys or self.tensors)

    def write(self, source: GGUFFile, target: Path, consume: bool = False) -> None:
        """Write `source` with the additions to `target`; consume: as rewrite takes it."""
        with target.open("wb") as file:
            rewrite(
                source,
                file,
                added_keys=self.keys,
                dropped_keys=self.dropped,
                added_tensors=self.tensors,
                consume=consume,
            )


def additions(directory: Path, config: dict, graph: Graph, file: GGUFFile) -> Additions:
    """Return what a file lacks. Raises UserError for what the architecture has no keys for."""
    result = Additions()
    for kind, wanted, found in _different(directory, config, graph, file):
        if kind is not None or not _express(result, graph, file, wanted, found):
            raise UserError(
                f"{directory} has the rotary embedding {_describe(config, kind)}, for which "
                f"llama.cpp's {file.architecture} has no keys",
                COMMON_CURE,
            )
    return result


def same(directory: Path, config: dict, graph: Graph, file: GGUFFile) -> bool:
    """Whether all layers of a file have the rotary embedding of a directory."""
    return not _different(directory, config, graph, file)


def _different(directory: Path, config: dict, graph: Graph, file: GGUFFile) -> list[tuple]:
    """Kind of layer (None: all of them), embedding of the directory, and the file's other one."""
    if not graph.turns:
        return []
    result = []
    for kind in _kinds_of_layers(config, graph, file):
        wanted, found = config_rotary(directory, config, kind), file_rotary(file, kind == SLIDES)
        if wanted.same(found):
            continue
        if graph.rounds_yarn and _parameters(config, kind).get("truncate") is False:
            rounded = config_rotary(directory, config, kind, truncate=True)
            if rounded.same(found):
                logger.warning(
                    f"note: {directory} has the rotary embedding {_describe(config, kind)}, where "
                    f"llama.cpp rounds the bounds of YaRN as with truncate true, in every file of "
                    f"{file.architecture}: results differ a little from torch's"
                )
                continue
        result.append((kind, wanted, found))
    return result


def _kinds_of_layers(config: dict, graph: Graph, file: GGUFFile) -> list[str | None]:
    """The types of layers that are compared; None for layers that are all turned alike."""
    used = set(config.get("layer_types") or ())
    alike = SLIDING.get(file.architecture, SlidingRotary()).scaled
    if not _is_nested(config) and alike or not used:
        return [None]
    return [kind for kind in (FULL, SLIDES) if kind in used and (kind == SLIDES or graph.turns_all)]


def _is_nested(config: dict) -> bool:
    return any(kind in (config.get("rope_parameters") or {}) for kind in (FULL, SLIDES))


def _express(
    result: Additions, graph: Graph, file: GGUFFile, wanted: Rotary, found: Rotary
) -> bool:
    """Add the keys and tensors that make the one embedding of a file another, if there are any."""
    prefix = f"{file.architecture}.rope.scaling."
    if wanted.same_angles(found):
        before = float(file.get(f"{prefix}attn_factor", 1.0))
        scale = before * wanted.scale / found.scale
        result.keys.append((f"{prefix}attn_factor", "f32", scale))
        result.dropped.append(f"{prefix}attn_factor")
        return True
    n_rot = 2 * len(wanted.short)
    if len(found.short) != len(wanted.short):
        return False
    if not (graph.lengths if wanted.by_length else graph.freqs):
        return False
    plain = plain_angles(file.get(f"{file.architecture}.rope.freq_base", 10000.0), n_rot)
    result.dropped += [name for name in file.keys if name.startswith(prefix)]
    result.keys.append((f"{prefix}attn_factor", "f32", wanted.scale))
    if wanted.by_length:
        result.keys.append((f"{prefix}type", "string", "longrope"))
        result.keys.append((f"{prefix}original_context_length", "u32", wanted.original))
        factors = {SHORT: plain / wanted.short, LONG: plain / wanted.long}
    else:
        result.keys.append((f"{prefix}type", "string", "none"))
        factors = {FREQS: plain / wanted.short}
    result.tensors |= {name: values.astype(np.float32) for name, values in factors.items()}
    return True


def _describe(config: dict, layers: str | None = None) -> str:
    """The parameters of the rotary embedding, without long lists."""
    parameters = _parameters(config, layers)
    kind = parameters.get("rope_type", "default")
    rest = [
        f"{name} {shown(value)}"
        for name, value in parameters.items()
        if isinstance(value, (int, float)) and name != "rope_theta"
    ]
    return f"{kind} ({', '.join(rest)})" if rest else str(kind)


def _parameters(config: dict, layers: str | None) -> dict[str, Any]:
    """The rotary parameters of a type of layers, in the form of transformers 5."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layers is not None and _is_nested(config):
        found = dict(found.get(layers) or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def _head_dim(config: dict, layers: str | None) -> int:
    if layers == FULL and config.get("global_head_dim"):
        return config["global_head_dim"]
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def config_rotary(directory: Path, config: dict, layers: str | None = None, **changed) -> Rotary:
    """The embedding that transformers computes.

    layers: the type of layers, where the types differ. changed: other rotary parameters.
    """
    parameters = _parameters(config, layers)
    context = int(config.get("max_position_embeddings") or 0)
    head, theta = _head_dim(config, layers), parameters["rope_theta"]
    if alpha := parameters.get("alpha"):  # HunYuan's way to stretch the base
        angles = plain_angles(theta * alpha ** (head / (head - 2)), head)
        return Rotary(angles, angles, 1.0, context)
    if parameters["rope_type"] == "default":
        share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        angles = plain_angles(theta, int(head * share))
        return Rotary(angles, angles, 1.0, context)
    from mod_export.model import loading

    named = layers if _is_nested(config) else None
    compute = loading.rotary_function(directory, parameters["rope_type"], named, **changed)
    original = int(parameters.get("original_max_position_embeddings") or context)
    short, scale = compute(1)
    long, _ = compute(2 * max(context, original))
    longer, _ = compute(4 * max(context, original))
    if np.allclose(long, longer, rtol=1e-6):
        return Rotary(short, long, scale, original)
    if not np.allclose(short, compute(context)[0], rtol=1e-6):
        raise UserError(
            f"{directory} has the rotary embedding {_describe(config, layers)}, whose angles "
            "change with the length of a text",
            COMMON_CURE,
        )
    logger.warning(
        f"note: {directory} has the rotary embedding {_describe(config, layers)}, which a GGUF "
        f"file cannot say: up to {context} tokens this changes nothing"
    )
    return Rotary(short, short, scale, original)


def shown(value: float) -> str:
    """An integer as it is, and a float in its shortest form."""
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)
