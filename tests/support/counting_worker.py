"""A process for the protocol of benchmark/processes.py that runs no model."""

import os
from collections.abc import Iterator

from mod_export.benchmark.processes import serve
from mod_export.errors import UserError


class Counter:
    """A worker that counts from `start` on."""

    def __init__(self, start: int):
        self.start = start

    def describe(self) -> dict:
        return {"start": self.start}

    def count(self, n: int) -> Iterator[int]:
        if n < 0:
            raise UserError("the count is negative", "use a larger one")
        numbers = range(self.start, self.start + n)
        yield from numbers
        return {"sum": sum(numbers)}

    def divide(self, n: int) -> dict:
        return {"result": self.start / n}

    def chat(self) -> dict:
        print("much")
        os.write(1, b"and more\n")
        return {"said": "much"}

    def leave(self, code: int) -> None:
        os.write(2, b"GGML_ASSERT(n > 0) failed\n")
        os._exit(code)


if __name__ == "__main__":
    serve(Counter)
