#include "mod-route.cuh"

#include "ggml-mod.h"

// One block for each token and unit. A unit's block reads the token's row once more to norm it, from L2, which costs
// less than a second launch; and the order of the sums depends on n_embd only, so that a token's score is the same bits
// in any batch.

// x^ . w + b, valid in thread 0
template <int block_size>
static __device__ float mod_logit(const float * x, const float * w, const float b, const int n, const float eps) {
    float sum_xx = 0.0f;
    float sum_xw = 0.0f;
    for (int j = threadIdx.x; j < n; j += block_size) {
        sum_xx += x[j]*x[j];
        sum_xw += x[j]*w[j];
    }

    __shared__ float2 shared[block_size/WARP_SIZE];
    const float2 sum = block_reduce<block_reduce_method::SUM, block_size>(make_float2(sum_xx, sum_xw), shared);

    return rsqrtf(sum.x/n + eps)*sum.y + b;
}

static __device__ bool mod_active(const float score, const float limit, const int32_t always) {
    return score >= limit || always;
}

static __device__ float mod_gate(const float score, const float limit, const int32_t always, const bool scale) {
    if (!mod_active(score, limit, always)) {
        return 0.0f;
    }
    return scale && score >= limit && limit > -INFINITY ? 1.0f/(1.0f + expf(-score)) : 1.0f;
}

// dst: [n_units, n_tokens]
template <int block_size>
static __global__ void mod_score_kernel(
        const float * h, const float * w, const float * b, float * dst, const int n, const int64_t s_h, const int64_t s_w,
        const int n_units, const float eps) {
    const int64_t i = blockIdx.x;
    const int     u = blockIdx.y;

    const float score = mod_logit<block_size>(h + i*s_h, w + u*s_w, b[u], n, eps);
    if (threadIdx.x == 0) {
        dst[i*n_units + u] = score;
    }
}

// dst: [1 + 3*n_tokens, n_units], see ggml_mod_route()
template <int block_size>
static __global__ void mod_route_kernel(
        const float * h, const float * w, const float * b, const float * limit, const int32_t * always, int32_t * dst,
        const int n, const int64_t s_h, const int64_t s_w, const int n_tokens, const float eps, const bool scale) {
    const int i = blockIdx.x;
    const int u = blockIdx.y;

    const float score = mod_logit<block_size>(h + i*s_h, w + u*s_w, b[u], n, eps);
    if (threadIdx.x != 0) {
        return;
    }

    int32_t * count = dst + u*(1 + 3*(int64_t) n_tokens);
    int32_t * ids   = count + 1;

    ids[  n_tokens + i] = __float_as_int(score);
    ids[2*n_tokens + i] = __float_as_int(mod_gate(score, limit[u], always[i], scale));

    if (n_tokens == 1) { // decode: all is said
        const bool active = mod_active(score, limit[u], always[0]);
        *count = active;
        *ids   = active ? 0 : -1;
    }
}

// The count and the indices of the active tokens, in ascending order. One block for each unit, one run of tokens for
// each of its threads.
template <int block_size>
static __global__ void mod_compact_kernel(const float * limit, const int32_t * always, int32_t * dst, const int n_tokens) {
    const int u = blockIdx.x;
    const int t = threadIdx.x;

    int32_t * count = dst + u*(1 + 3*(int64_t) n_tokens);
    int32_t * ids   = count + 1;

    const int32_t * score = ids + n_tokens;

    const int n_run = (n_tokens + block_size - 1)/block_size;
    const int i0    = min(t*n_run,  n_tokens);
    const int i1    = min(i0 + n_run, n_tokens);

    int n_active = 0;
    for (int i = i0; i < i1; ++i) {
        n_active += mod_active(__int_as_float(score[i]), limit[u], always[i]);
    }

    // inclusive sums over the threads
    __shared__ int sum[block_size];
    sum[t] = n_active;
    __syncthreads();
    for (int d = 1; d < block_size; d *= 2) {
        const int before = t >= d ? sum[t - d] : 0;
        __syncthreads();
        sum[t] += before;
        __syncthreads();
    }

    int at = sum[t] - n_active;
    for (int i = i0; i < i1; ++i) {
        if (mod_active(__int_as_float(score[i]), limit[u], always[i])) {
            ids[at++] = i;
        }
    }

    const int n_all = sum[block_size - 1];
    for (int i = n_all + t; i < n_tokens; i += block_size) {
        ids[i] = -1;
    }
    if (t == 0) {
        *count = n_all;
    }
}

void ggml_cuda_op_mod_score(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * h = dst->src[0];
    const ggml_tensor * w = dst->src[1];
    const ggml_tensor * b = dst->src[2];

    for (const ggml_tensor * t : { h, w, b, (const ggml_tensor *) dst }) {
        GGML_ASSERT(t->type == GGML_TYPE_F32);
        GGML_ASSERT(t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0);
    }
    GGML_ASSERT(ggml_is_contiguous(dst));
    GGML_ASSERT(h->ne[0] == w->ne[0] && h->ne[1] == dst->ne[1] && w->ne[1] == dst->ne[0] && b->ne[0] == dst->ne[0]);

    const int64_t n_units  = dst->ne[0];
    const int64_t n_tokens = dst->ne[1];

    mod_score_kernel<CUDA_MOD_ROUTE_BLOCK_SIZE><<<dim3(n_tokens, n_units), CUDA_MOD_ROUTE_BLOCK_SIZE, 0, ctx.stream()>>>(
        (const float *) h->data, (const float *) w->data, (const float *) b->data, (float *) dst->data,
        h->ne[0], h->nb[1]/sizeof(float), w->nb[1]/sizeof(float), n_units, ggml_mod_get_params(dst)->eps);
}

void ggml_cuda_op_mod_route(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * h      = dst->src[0];
    const ggml_tensor * w      = dst->src[1];
    const ggml_tensor * b      = dst->src[2];
    const ggml_tensor * limit  = dst->src[3];
    const ggml_tensor * always = dst->src[4];

    const int64_t n_units  = dst->ne[1];
    const int64_t n_tokens = h->ne[1];

    for (const ggml_tensor * t : { h, w, b, limit }) {
        GGML_ASSERT(t->type == GGML_TYPE_F32);
        GGML_ASSERT(t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0);
    }
    GGML_ASSERT(always->type == GGML_TYPE_I32 && ggml_is_contiguous(always) && always->ne[0] == n_tokens);
    GGML_ASSERT(dst->type == GGML_TYPE_I32 && ggml_is_contiguous(dst) && dst->ne[0] == 1 + 3*n_tokens);
    GGML_ASSERT(h->ne[0] == w->ne[0] && w->ne[1] == n_units && b->ne[0] == n_units && limit->ne[0] == n_units);

    const ggml_mod_params * params = ggml_mod_get_params(dst);
    cudaStream_t stream = ctx.stream();

    mod_route_kernel<CUDA_MOD_ROUTE_BLOCK_SIZE><<<dim3(n_tokens, n_units), CUDA_MOD_ROUTE_BLOCK_SIZE, 0, stream>>>(
        (const float *) h->data, (const float *) w->data, (const float *) b->data, (const float *) limit->data,
        (const int32_t *) always->data, (int32_t *) dst->data, h->ne[0], h->nb[1]/sizeof(float), w->nb[1]/sizeof(float),
        n_tokens, params->eps, params->scale != 0);

    if (n_tokens > 1) {
        mod_compact_kernel<CUDA_MOD_ROUTE_BLOCK_SIZE><<<n_units, CUDA_MOD_ROUTE_BLOCK_SIZE, 0, stream>>>(
            (const float *) limit->data, (const int32_t *) always->data, (int32_t *) dst->data, n_tokens);
    }
}

bool ggml_cuda_op_mod_route_supported(int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);

    const ggml_tensor * h = dst->src[0];
    const ggml_tensor * w = dst->src[1];

    // views of the residual stream are fine, transposed ones are not
    return h->nb[0] == sizeof(float) && w->nb[0] == sizeof(float) && h->ne[1] > 0 && w->ne[1] <= CUDA_MOD_ROUTE_MAX_UNITS;
}
