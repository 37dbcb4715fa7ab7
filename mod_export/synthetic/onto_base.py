"""Random routers on the weights of a dense GGUF, fitted to an activation on text.

    onto("dense.gguf", "block.gguf", SynthesisOptions(units="block", activation="0.5"))

It is for measuring speed. Such a model writes worse text than one with calibrated routers
(`mod-export convert`), but it takes seconds to make. The patched runtime has to be installed. The
biases are fitted in the runtime alone, without torch.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from mod_export.common.files import atomic_file
from mod_export.common.progress import stage
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.export import write_routers
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.schema import Routers
from mod_export.synthetic.routers import SPREAD, SynthesisOptions, routing_of
from mod_export.synthetic.weights import rng_of

logger = logging.getLogger(__name__)

FIT_TOKENS = 1500
# A unit's scores depend on the decisions before it, so the activations settle layer by layer.
ROUNDS = 8


def onto(
    base: str | os.PathLike,
    output: str | os.PathLike,
    options: SynthesisOptions,
    seed: int = 0,
    force: bool = False,
    text: str | None = None,
    rounds: int = ROUNDS,
) -> None:
    """Write `output`: the weights of `base` with random routers.

    The biases of the routers are fitted so that the share options.activation of the text's tokens
    runs. It is met within a few points in each unit, in fewer rounds less closely. text: by default
    the packaged one. Raises UserError for a base that is no dense GGUF or has no vocabulary, and
    for an existing output.
    """
    file = GGUFFile.open(base)
    n_embd = file.model_number("embedding_length")
    if file.get("tokenizer.ggml.model") in (None, "no_vocab"):
        raise UserError(f"{base} has no vocabulary", "give a preset: `mod-export synth 1b`")
    config = routing_of(file, options)
    rng = rng_of(seed, "routers")
    routers: Routers = {
        unit: (
            SPREAD * rng.standard_normal(n_embd).astype(np.float32) / np.sqrt(np.float32(n_embd)),
            np.zeros(1, np.float32),
        )
        for unit in config.routed()
    }
    with atomic_file(output, force) as tmp:
        for number in range(rounds):
            with stage(f"running the model, round {number + 1} of {rounds}"):
                write_routers(file, tmp, config, routers)
                active, score = _trace(tmp, text)
            logger.info(
                f"fitting biases, round {number + 1} of {rounds}: activation {active.mean():.3f}, "
                f"by unit {active.mean(0).min():.3f} to {active.mean(0).max():.3f}"
            )
            _move_biases(config, routers, score[options.sink_tokens :])
        with stage(f"writing {output}"):
            write_routers(file, tmp, config, routers)


def _trace(path: Path, text: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Decisions and router logits of the text's first tokens, [T, n_units]."""
    from mod_export.data.text import default_texts
    from mod_export.runtime.llama import MoDLlama

    text = text or "\n\n".join(default_texts())
    llm = MoDLlama(path, n_ctx=2048, n_batch=2048)
    try:
        llm.eval(llm.tokenize(text.encode())[:FIT_TOKENS])
        return llm.trace()
    finally:
        llm.close()


def _move_biases(config: MoDConfig, routers: Routers, score: np.ndarray) -> None:
    for index, unit in enumerate(config.routed()):
        share = config.activation(unit)
        routers[unit][1][0] -= np.float32(np.quantile(score[:, index], 1 - share))
