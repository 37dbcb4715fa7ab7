"""LoRA adapters of random numbers as GGUF files.

made = write_lora(path, "llama", {"blk.0.attn_q.weight": (576, 576)})      # name -> (a, b)
"""

from pathlib import Path

import gguf
import numpy as np


def write_lora(
    path: Path,
    arch: str,
    shapes: dict[str, tuple[int, int]],
    rank: int = 4,
    seed: int = 3,
    scale: float = 0.5,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write an adapter, and return its a [rank, cols] and b [rows, rank] for each tensor.

    shapes: (rows, cols) of the tensors. scale: of the values of b. The adapted weight is w + b @ a.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    made = {}
    for name, (rows, cols) in shapes.items():
        a = (0.05 * rng.standard_normal((rank, cols))).astype(np.float32)
        b = (scale * rng.standard_normal((rows, rank))).astype(np.float32)
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
        made[name] = a, b
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made
