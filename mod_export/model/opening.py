"""Open a model for one pass: layer by layer where that is possible, else whole, if it fits.

base, tokenizer = open_base("smollm2", path, "auto", torch.device("cpu"))
"""

from __future__ import annotations

import logging
from pathlib import Path

from mod_export.common.progress import stage
from mod_export.common.system import available_memory
from mod_export.common.text import size
from mod_export.errors import UserError
from mod_export.model import devices, loading
from mod_export.model.safetensors_weights import CannotStream

logger = logging.getLogger(__name__)


STREAMABLE = "get the model as safetensors files, or use a larger machine"


def open_base(
    model: str, path: Path, dtype: str, device, whole: str = "", cure: str = "use a larger machine"
):
    """Return a model, one layer of which is in memory at a time, and its tokenizer.

    model: what messages call it. dtype: as model/devices.py names it. whole: why all layers are
    needed at once, cure: what helps then where memory is short. Then, and where a model cannot be
    read layer by layer, the log says how much memory it takes. Raises UserError where that is more
    than there is.
    """
    logger.info(f"loading {model}")
    chosen = devices.choose_dtype(dtype, loading.stored_type(path), device)
    with stage(f"loading {model}"):
        if not whole:
            try:
                return loading.open_streamed(path, chosen, device)
            except CannotStream as exc:
                whole, cure = str(exc), STREAMABLE
        need, room = loading.weights_bytes(path, chosen), available_memory()
        says = (
            f"{model} takes {size(need)} of memory, all weights at once, and {size(room)} are left"
        )
        if need > room:
            raise UserError(f"{says}: {whole}", cure)
        logger.info(f"{says}: {whole}")
        base, tokenizer = loading.load(path, chosen)
        return base.to(device), tokenizer
