"""The precision that matrices are multiplied in while training.

    name = autocast("auto")                  # one of Accelerate's names: no, bf16, fp16
    slower("bf16")                           # 7.3 on a CPU that has no instructions for it
"""

from __future__ import annotations

import time

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(name: str) -> str:
    """`auto`: bf16 where a CUDA device has it, else no. Others are Accelerate's names."""
    if name == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return name


def slower(name: str) -> float:
    """How many times as long as in float32 a product of matrices takes on this CPU. name: bf16 or fp16.

    Below 1 where the CPU has instructions for the type. Others convert every number, and can be many times slower.
    """
    times = {}
    for dtype in (torch.float32, DTYPES[name]):
        x, weight = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times[dtype] = min(_seconds(x, weight) for _ in range(4))  # the first one prepares
    return times[DTYPES[name]] / times[torch.float32]


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    begin = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - begin
