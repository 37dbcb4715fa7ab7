"""Work that may take more memory than there is: told before it begins, refused with what helps.

tell("training takes about 3 GB, and 2 GB are left", 3e9, 2e9, 0.2, lambda: "use --recompute")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from mod_export.common.text import size
from mod_export.errors import UserError

logger = logging.getLogger(__name__)


def tell(says: str, need: float, room: float, tolerance: float, cure: Callable[[], str]) -> None:
    """Log what some work takes of memory.

    need: predicted, in bytes, and too high by at most the share `tolerance`. room: the bytes that
    are left. cure: says what helps. Raises UserError where the work cannot fit.
    """
    if need * (1 - tolerance) > room:
        raise UserError(says, cure())
    logger.info(says)
    if need > room:
        logger.warning(f"note: it may not fit; {cure()}")


def mildest(choices: Iterable[tuple[str, float]], room: float, more: str = "") -> str:
    """Return the first options with which work fits, or what the last ones take.

    choices: options, and the bytes with them, the mildest first; one at least. more: what helps
    besides a larger machine.
    """
    for options, need in choices:
        if need <= room:
            return f"use {options}"
    return f"{options} would take {size(need)}: use a larger machine{more}"
