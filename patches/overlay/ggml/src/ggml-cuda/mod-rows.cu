#include "mod-rows.cuh"

#include "ggml-mod.h"

// how many rows there are is known on the device only: a block for each that there may be

static __global__ void mod_gather_kernel(
        const float * h, const int32_t * route, float * dst, const int n_embd, const int64_t s_h) {
    const int i = blockIdx.x;

    const float * src = h + (i < route[0] ? route[1 + i] : 0)*s_h;

    for (int j = threadIdx.x; j < n_embd; j += blockDim.x) {
        dst[(int64_t) i*n_embd + j] = src[j];
    }
}

static __global__ void mod_scatter_kernel(
        const float * x, const int32_t * route, float * dst, const int n_embd, const int n_tokens, const int64_t s_x, const int64_t s_dst) {
    const int i = blockIdx.x;
    if (i >= route[0]) {
        return;
    }

    const int32_t id   = route[1 + i];
    const float   gate = __int_as_float(route[1 + 2*n_tokens + id]);

    const float * xi = x   + i *s_x;
    float       * hi = dst + id*s_dst;

    for (int j = threadIdx.x; j < n_embd; j += blockDim.x) {
        // a hard gate leaves the unit's result as it is
        hi[j] = gate == 1.0f ? xi[j] : hi[j] + gate*(xi[j] - hi[j]);
    }
}

// the unit's column
static const int32_t * mod_route_of(const ggml_tensor * route, const ggml_tensor * dst) {
    GGML_ASSERT(route->type == GGML_TYPE_I32 && ggml_is_contiguous(route));

    return (const int32_t *) route->data + ggml_mod_get_params(dst)->unit*route->ne[0];
}

void ggml_cuda_op_mod_gather(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * h     = dst->src[0];
    const ggml_tensor * route = dst->src[1];

    GGML_ASSERT(h->type == GGML_TYPE_F32 && h->nb[0] == sizeof(float) && h->nb[1] % sizeof(float) == 0);
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst));
    GGML_ASSERT(h->ne[0] == dst->ne[0] && route->ne[0] == 1 + 3*dst->ne[1]);

    mod_gather_kernel<<<dst->ne[1], CUDA_MOD_ROWS_BLOCK_SIZE, 0, ctx.stream()>>>(
        (const float *) h->data, mod_route_of(route, dst), (float *) dst->data, dst->ne[0], h->nb[1]/sizeof(float));
}

void ggml_cuda_op_mod_scatter(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * x     = dst->src[1];
    const ggml_tensor * route = dst->src[2];

    for (const ggml_tensor * t : { x, (const ggml_tensor *) dst }) {
        GGML_ASSERT(t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0);
    }
    GGML_ASSERT(dst->data == dst->src[0]->data); // in place
    GGML_ASSERT(x->ne[0] == dst->ne[0] && route->ne[0] == 1 + 3*x->ne[1]);

    mod_scatter_kernel<<<x->ne[1], CUDA_MOD_ROWS_BLOCK_SIZE, 0, ctx.stream()>>>(
        (const float *) x->data, mod_route_of(route, dst), (float *) dst->data, x->ne[0], x->ne[1],
        x->nb[1]/sizeof(float), dst->nb[1]/sizeof(float));
}

bool ggml_cuda_op_mod_rows_supported(int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);

    const ggml_tensor * h = dst->src[0];
    const ggml_tensor * x = dst->src[1];

    return h->nb[0] == sizeof(float) && x->nb[0] == sizeof(float) && dst->ne[1] > 0;
}
