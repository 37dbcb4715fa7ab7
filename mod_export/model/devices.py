"""Where a model computes, and in which type.

device = parse_device("cuda:1")
dtype = choose_dtype("auto", "bf16", device)      # bf16: what the weights have
"""

from __future__ import annotations

import torch

from mod_export.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Types of weights -> what computes with them
OF_WEIGHTS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def parse_device(text: str) -> torch.device:
    """Return a device that is there: cpu, cuda, cuda:N or mps. Raises UserError for any other."""
    kind, _, number = text.partition(":")
    known = "known: cpu, cuda, cuda:N, mps"
    if kind not in ("cpu", "cuda", "mps") or number and not (kind == "cuda" and number.isdecimal()):
        raise UserError(f"unknown device {text!r}", known)
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(
                f"there is no device {text}: this torch finds no GPU",
                "use --device cpu, or install a torch that is built for the GPU",
            )
        if number and int(number) >= count:
            last = f" to cuda:{count - 1}" if count > 1 else ""
            raise UserError(f"there is no device {text}", f"there is cuda:0{last}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"there is no device {text} on this machine", "use --device cpu")
    return torch.device(text)


def choose_dtype(name: str, weights: str, device: torch.device) -> torch.dtype:
    """Return the type to compute in: `auto` is that of the weights where the device is fast in it.

    weights: f32, bf16, f16, or another name for weights that torch has no type for.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        dtype = DTYPES[OF_WEIGHTS.get(weights, "float32")]
        return dtype if dtype == torch.bfloat16 and _cpu_has_bfloat16() else torch.float32
    dtype = DTYPES[OF_WEIGHTS.get(weights, "bfloat16")]
    if dtype == torch.bfloat16 and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return dtype if capability >= (8, 0) else torch.float32
    return dtype


def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
