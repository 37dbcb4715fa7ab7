"""The precision that matrices are multiplied in while training.

name = autocast("auto")                  # one of Accelerate's names: no, bf16, fp16
slower()                                 # 7.3 on a CPU that has no instructions for bf16
"""

from __future__ import annotations

import time

import torch

from mod_export.errors import UserError


def autocast(name: str) -> str:
    """`auto`: bf16 where a CUDA device has it, else no. Others are Accelerate's names.

    Raises UserError for fp16 on a CPU, where Accelerate would say nothing and train in float32.
    """
    if name == "auto":
        has = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has else "no"
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("fp16 needs a GPU", "use --precision no")
    return name


def slower() -> float:
    """How many times as long in bf16 as in float32 a product of matrices takes on this CPU.

    Below 1 where the CPU has instructions for it. Others convert every number, and can be many
    times slower.
    """
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times[dtype] = min(_seconds(x, weight) for _ in range(4))  # the first one prepares
    return times[torch.bfloat16] / times[torch.float32]


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    begin = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - begin
