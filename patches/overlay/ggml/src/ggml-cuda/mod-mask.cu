#include "mod-mask.cuh"

#include "ggml-mod.h"

template <typename T>
static __global__ void mod_mask_kernel(
        const float2 * cells, const int32_t * pos, const int32_t * seq, T * dst, const int n_kv, const int n_cells) {
    const int j = blockIdx.x*CUDA_MOD_MASK_BLOCK_SIZE + threadIdx.x;
    const int i = blockIdx.y;
    if (j >= n_kv) {
        return;
    }

    // positions of the first and the last query that sees the cell
    const float2 cell = cells[(int64_t) (seq ? seq[i] : 0)*n_cells + j];
    const float  q    = pos[i];

    dst[(int64_t) i*n_kv + j] = cell.x <= q && q <= cell.y ? T(0.0f) : T(-INFINITY);
}

template <typename T>
static void mod_mask_cuda(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * cells = dst->src[0];
    const ggml_tensor * pos   = dst->src[1];
    const ggml_tensor * seq   = dst->src[2];

    const dim3 blocks((dst->ne[0] + CUDA_MOD_MASK_BLOCK_SIZE - 1)/CUDA_MOD_MASK_BLOCK_SIZE, dst->ne[1]);

    mod_mask_kernel<T><<<blocks, CUDA_MOD_MASK_BLOCK_SIZE, 0, ctx.stream()>>>(
        (const float2 *) cells->data, (const int32_t *) pos->data, seq ? (const int32_t *) seq->data : nullptr,
        (T *) dst->data, dst->ne[0], cells->ne[1]);
}

void ggml_cuda_op_mod_mask(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * cells = dst->src[0];
    const ggml_tensor * pos   = dst->src[1];
    const ggml_tensor * seq   = dst->src[2];

    GGML_ASSERT(cells->type == GGML_TYPE_F32 && ggml_is_contiguous(cells) && cells->ne[0] == 2 && cells->ne[1] >= dst->ne[0]);
    GGML_ASSERT(pos->type == GGML_TYPE_I32 && ggml_is_contiguous(pos) && pos->ne[0] == dst->ne[1]);
    GGML_ASSERT(!seq || (seq->type == GGML_TYPE_I32 && ggml_is_contiguous(seq) && seq->ne[0] == dst->ne[1]));
    GGML_ASSERT(ggml_is_contiguous(dst));

    switch (dst->type) {
        case GGML_TYPE_F32:
            mod_mask_cuda<float>(ctx, dst);
            break;
        case GGML_TYPE_F16:
            mod_mask_cuda<half>(ctx, dst);
            break;
        default:
            GGML_ABORT("unsupported type");
    }
}

bool ggml_cuda_op_mod_mask_supported(int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);

    return dst->ne[0] > 0 && dst->ne[1] > 0 && dst->ne[1] <= CUDA_MOD_MASK_MAX_TOKENS;
}
