"""The instances of CUDA kernels that the runs of scripts/gpu need, and stubs for all the others.

Upstream compiles its kernels of attention and of quantised products for every size of head and
every type. That takes most of the time of a build and most of its bytes. write() makes a folder of
sources in place of upstream's template-instances. A stub ends the process and says why.
"""

import re
from pathlib import Path

HEADS = ("64", "128")  # sizes of heads
QUERIES = ("1", "4")  # query heads for each K/V head; 3 are computed as 4, and 1 is for odd shapes
TYPES = ("GGML_TYPE_Q4_0", "GGML_TYPE_Q6_K", "GGML_TYPE_Q8_0")
# the templates of upstream's headers: name, parameters, arguments
TEMPLATES = {
    "FATTN_MMA_F16_CASE": ("ggml_cuda_flash_attn_ext_mma_f16_case", "int, int, int, int", "ATTN"),
    "FATTN_TILE_CASE": ("ggml_cuda_flash_attn_ext_tile_case", "int, int", "ATTN"),
    "FATTN_VEC_CASE": ("ggml_cuda_flash_attn_ext_vec_case", "int, ggml_type, ggml_type", "ATTN"),
    "MMQ_CASE": ("mul_mat_q_case", "ggml_type, ggml_prec = GGML_PREC_Q8", "PRODUCT"),
}
STUBS = (
    """\
#include "ggml.h"
struct ggml_backend_cuda_context;
struct mmq_args;
typedef struct CUstream_st * cudaStream_t;
#define ATTN (ggml_backend_cuda_context &, ggml_tensor *)
#define PRODUCT (ggml_backend_cuda_context &, const mmq_args &, cudaStream_t)
#define LEFT_OUT { GGML_ABORT("this build has only the kernels of scripts/gpu/instances.py"); }
"""
    + "".join(
        f"template <{parameters}> void {name} {arguments} LEFT_OUT\n"
        f"#define DECL_{macro}(...) template void {name}<__VA_ARGS__> {arguments}\n"
        for macro, (name, parameters, arguments) in TEMPLATES.items()
    )
    + "#define DECL_MMQ_CASE_W4A4(type) DECL_MMQ_CASE(type, GGML_PREC_Q4)\n"
)


def write(upstream: Path, target: Path) -> None:
    """Write the sources into the folder `target`. Files that have the right content stay untouched.

    upstream: ggml/src/ggml-cuda/template-instances
    """
    target.mkdir(parents=True, exist_ok=True)
    stubs, wanted = STUBS, {}
    for pattern in ("fattn-mma*.cu", "fattn-tile*.cu", "fattn-vec-instance-f16-f16.cu", "mmq*.cu"):
        for path in sorted(upstream.glob(pattern)):
            lines = re.findall(r"^DECL_(\w+)\((.*)\);", path.read_text(), re.MULTILINE)
            kept = [(kind, args) for kind, args in lines if _used(kind, args.replace(" ", ""))]
            stubs += "".join(_line(*line) for line in lines if line not in kept)
            if kept:
                header = re.search(r"^#include \"../(.*)\"", path.read_text(), re.MULTILINE)[1]
                wanted[path.name] = f'#include "{header}"\n' + "".join(_line(*x) for x in kept)
    wanted["stubs.cpp"] = stubs
    for path in target.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = target / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def _used(kind: str, args: str) -> bool:
    first, last = args.split(",")[0], args.split(",")[-1]
    return {
        "FATTN_MMA_F16_CASE": first in HEADS and last in QUERIES,
        "FATTN_VEC_CASE": first in HEADS,
        "FATTN_TILE_CASE": False,  # for GPUs without tensor cores
        "MMQ_CASE": first in TYPES,
        "MMQ_CASE_W4A4": False,  # for GPUs that multiply FP4
    }[kind]


def _line(kind: str, args: str) -> str:
    return f"DECL_{kind}({args});\n"
