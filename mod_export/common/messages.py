"""What messages and errors call things that users do not know.

with called(folder / "mod", "the converted model"): ...
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from mod_export.errors import UserError


@contextlib.contextmanager
def called(path: Path, name: str) -> Iterator[None]:
    """Let messages and errors of the block call a temporary path by a name that users know."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(str(path), name), ()
        return True

    handlers = list(logging.getLogger("mod_export").handlers)
    for handler in handlers:
        handler.addFilter(rename)
    try:
        yield
    except UserError as exc:
        parts = (part.replace(str(path), name) for part in (exc.message, exc.cure))
        raise UserError(*parts) from exc
    finally:
        for handler in handlers:
            handler.removeFilter(rename)
