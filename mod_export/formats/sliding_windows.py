"""Which layers of a GGUF file attend to a sliding window only, and to how many tokens.

    layer_windows(GGUFFile.open("gemma-3.gguf"))     # (512, 512, 512, 512, 512, 0, 512, ...)

Files seldom say it for each layer. llama.cpp has the rest in its source, as load_arch_hparams of
each architecture (src/models/*.cpp of llama.cpp); SLIDING is the same as a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mod_export.errors import UserError
from mod_export.formats.gguf import GET_AGAIN, GGUFFile

SECTIONS = "rope.dimension_sections"  # has a length of its own


@dataclass(frozen=True)
class SlidingLayers:
    """What llama.cpp takes for the sliding layers of an architecture.

    period: one layer of so many has full attention, the last one, or with full_first the first one;
    0: none has; None: the file lists the layers. default: window in tokens where the file names
    none. fixed: the window whatever the file names. only_with: layers of the one model that slides.
    """

    period: int | None
    full_first: bool = False
    default: int = 0
    fixed: int = 0
    only_with: int = 0


SLIDING = {
    **dict.fromkeys(
        ("afmoe", "cohere2", "exaone-moe", "mellum", "muse-glimmer", "olmo2"), SlidingLayers(4)
    ),
    **dict.fromkeys(("cohere2moe", "laguna"), SlidingLayers(4, full_first=True)),
    **dict.fromkeys(("gemma3", "gemma-embedding"), SlidingLayers(6)),
    "exaone4": SlidingLayers(4, default=4096, only_with=64),
    "gemma2": SlidingLayers(2, default=4096),
    "gemma3n": SlidingLayers(5),
    "gpt-oss": SlidingLayers(2),
    "llama4": SlidingLayers(4, default=8192, fixed=8192),  # chunks
    "modern-bert": SlidingLayers(3, full_first=True),
    "plamo3": SlidingLayers(8),
    "smallthinker": SlidingLayers(4, full_first=True, fixed=4096),
    **dict.fromkeys(("deepseek4", "lfm2"), SlidingLayers(0)),
    **dict.fromkeys(
        (
            *("dflash", "dots3note", "gemma4", "gemma4-assistant", "granite_swa", "maple"),
            *("mimo2", "spark2_5", "step35"),
        ),
        SlidingLayers(None),
    ),
}


def layer_windows(file: GGUFFile) -> tuple[int, ...]:
    """Tokens that each layer attends to, [n_layer]; 0: all of them.

    Where a layer attends in chunks it is the length of a chunk. Raises UserError for keys that are
    no numbers.
    """
    n_layer = file.model_number("block_count")
    rule = SLIDING.get(file.architecture)
    if rule is None or rule.only_with not in (0, n_layer):
        return (0,) * n_layer
    window = whole_number(file, "attention.sliding_window", rule.default)
    window = rule.fixed if window and rule.fixed else window
    return tuple(window if slides else 0 for slides in _pattern(file, rule, n_layer))


def main_layers(file: GGUFFile) -> int:
    """The number of layers without those for drafts, which are no part of an ordinary context.

    Raises UserError for keys that are no numbers.
    """
    return file.model_number("block_count") - draft_layers(file)


def draft_layers(file: GGUFFile) -> int:
    """The number of last layers that predict tokens further on; block_count counts them too.

    Raises UserError for keys that are no numbers, and where no other layers are left.
    """
    n_draft = whole_number(file, "nextn_predict_layers", 0)
    if n_draft and n_draft >= file.model_number("block_count"):
        raise UserError(
            f"{file.path}: key {file.architecture}.nextn_predict_layers leaves no other layers",
            "give the file of the model itself: one with layers for drafts alone is no model",
        )
    return n_draft


def has_experts(file: GGUFFile) -> bool:
    """Whether the model is a mixture of experts."""
    return whole_number(file, "expert_count", 0) > 0


def layer_arrays(file: GGUFFile, n_layer: int) -> list[str]:
    """The keys of a file's architecture that have one value for each of so many layers."""
    return [
        name
        for name, key in file.keys.items()
        if name.startswith(f"{file.architecture}.")
        and not name.endswith(f".{SECTIONS}")
        and isinstance(key.value, np.ndarray)
        and len(key.value) == n_layer
    ]


def _pattern(file: GGUFFile, rule: SlidingLayers, n_layer: int) -> list[bool]:
    """Whether each layer slides, as the file lists it or as every n-th layer does not."""
    name = "attention.sliding_window_pattern"
    listed = file.get(f"{file.architecture}.{name}")
    if rule.period != 0 and isinstance(listed, np.ndarray):
        return [bool(value) for value in listed[:n_layer]] + [False] * (n_layer - len(listed))
    if rule.period is None:
        return [False] * n_layer
    period = whole_number(file, name, rule.period) if rule.period else 0
    full = 0 if rule.full_first else period - 1
    n_main = main_layers(file)
    return [layer < n_main and (not period or layer % period != full) for layer in range(n_layer)]


def whole_number(file: GGUFFile, name: str, default: int) -> int:
    """The value of a key of the architecture; raises UserError where it is no whole number."""
    value = file.get(f"{file.architecture}.{name}", default)
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"{file.path}: key {file.architecture}.{name} is no whole number", GET_AGAIN
        )
    return int(value)
