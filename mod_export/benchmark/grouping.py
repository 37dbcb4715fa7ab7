"""Which variants of a benchmark run side by side: as many as fit into memory at once.

Example:

    found = groups(variants, bytes_of, available_memory())
"""

import logging

from mod_export.common.system import available_memory as host_memory
from mod_export.common.text import size
from mod_export.formats.ggml_types import bytes_per_value
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import kv_layers

logger = logging.getLogger(__name__)

# Variants that are compared have to run side by side. From few large groups to many small ones.
GROUPINGS = (
    (("ceiling", "ceiling_split", "floor", "dense_patched", "mod", "all_active", "none_active"),),
    (
        ("ceiling", "floor", "mod", "none_active"),
        ("ceiling", "ceiling_split", "dense_patched", "all_active"),
    ),
    (
        ("ceiling", "floor", "mod"),
        ("floor", "none_active"),
        ("ceiling", "dense_patched", "all_active"),
        ("ceiling", "ceiling_split"),
    ),
)
# ggml's CPU backend copies weights of these types into a layout of its own, which processes do not
# share: q4_0, q2_k, q4_k, q5_k, q6_k, iq4_nl, mxfp4.
REPACKED_TYPES = {2, 10, 12, 13, 14, 20, 39}
PROCESS_BYTES = 300 << 20  # Python, libraries and compute buffers, about
GPU_PROCESS_BYTES = 1 << 30  # kernels and compute buffers on a GPU, a guess


def groups(variants: list[str], bytes_of: dict[str, int], available: int) -> list[list[str]]:
    """Variants that run side by side: all of them, or groups where memory is short.

    bytes_of: what each variant needs. Where not even the smallest groups fit, a note says so, and
    they are tried.
    """
    for grouping in GROUPINGS:
        found = [[v for v in group if v in variants] for group in grouping]
        found = [
            g for i, g in enumerate(found) if not any(set(g) <= set(other) for other in found[:i])
        ]
        need = max(sum(bytes_of[v] for v in group) for group in found)
        if need <= available:
            break
    if len(found) > 1:
        logger.warning(
            f"note: all variants at once need about {size(sum(bytes_of[v] for v in variants))}, "
            f"{size(available)} are free: they run in groups, "
            + "; ".join(", ".join(group) for group in found)
        )
    if need > available:
        logger.warning(
            f"note: about {size(need)} are needed, {size(available)} are free: this may end or swap"
        )
    return found


def process_bytes(file: GGUFFile, kv_bytes: float, on_gpu: bool = False) -> int:
    """Memory that a process takes for itself, about; on a GPU, memory of the GPU.

    Processes share the mapped file. They share neither repacked weights nor anything on a GPU.
    """
    own = sum(t.nbytes for t in file.tensors.values() if on_gpu or t.type in REPACKED_TYPES)
    fixed = GPU_PROCESS_BYTES if on_gpu else PROCESS_BYTES
    return int(own + kv_bytes + fixed)


def dense_bytes(
    file: GGUFFile, n_tokens: int, types: tuple[int, int], ubatch: int, sequences: int
) -> float:
    """Bytes of K and V of n tokens in a dense model; types: ggml's, of K and V."""
    k, v = (bytes_per_value(kind) for kind in types)
    return sum(layer.dense_bytes(n_tokens, ubatch, sequences) for layer in kv_layers(file, k, v))


def available_memory(on_gpu: bool = False) -> int:
    """Bytes that can be taken without swapping, or of all GPUs together, less a tenth."""
    if on_gpu:
        from mod_export.runtime.devices import free_memory

        return free_memory() * 9 // 10
    return host_memory()
