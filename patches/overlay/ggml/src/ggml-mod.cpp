#include "ggml-mod.h"

#include "ggml-impl.h"

#include <cmath>
#include <cstring>

static constexpr uint32_t MOD_MAGIC  = 0x4d6f4421;
static constexpr size_t   MOD_OFFSET = sizeof(ggml_custom_op_params);

static_assert(MOD_OFFSET + sizeof(ggml_mod_params) <= GGML_MAX_OP_PARAMS);

const ggml_mod_params * ggml_mod_get_params(const ggml_tensor * t) {
    const auto * params = (const ggml_mod_params *) ((const char *) t->op_params + MOD_OFFSET);

    return t->op == GGML_OP_CUSTOM && params->magic == MOD_MAGIC ? params : nullptr;
}

static ggml_tensor * mod_set_params(ggml_tensor * t, const ggml_mod_params & params) {
    memcpy((char *) t->op_params + MOD_OFFSET, &params, sizeof(params));
    return t;
}

// element i0 of row i1 of matrix i2
template <typename T> static T * mod_at(const ggml_tensor * t, int64_t i0, int64_t i1 = 0, int64_t i2 = 0) {
    return (T *) ((char *) t->data + i0*sizeof(T) + i1*t->nb[1] + i2*t->nb[2]);
}

//
// attention
//

static constexpr int     MOD_I_TILES = 8;  // in op_params, behind flash attention's own
static constexpr int64_t MOD_N_TILES = 16; // queries from which tiles are faster, with Q8_0 and Q4_0

void ggml_mod_set_tiles(ggml_tensor * attn) {
    GGML_ASSERT(attn->op == GGML_OP_FLASH_ATTN_EXT && attn->src[0]->type == GGML_TYPE_F32);

    const bool is_quantized = ggml_is_quantized(attn->src[1]->type) || ggml_is_quantized(attn->src[2]->type);
    ggml_set_op_params_i32(attn, MOD_I_TILES, is_quantized && attn->src[0]->ne[1] >= MOD_N_TILES);
}

bool ggml_mod_has_tiles(const ggml_tensor * attn) {
    return ggml_get_op_params_i32(attn, MOD_I_TILES) != 0;
}

//
// scores
//

static float mod_dot(const float * x, const float * y, int64_t n) {
    // lanes that the compiler turns into vectors
    float sum[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            sum[j] += x[i + j]*y[i + j];
        }
    }
    double res = 0.0;
    for (int j = 0; j < 16; ++j) {
        res += sum[j];
    }
    for (; i < n; ++i) {
        res += x[i]*y[i];
    }
    return res;
}

float ggml_mod_rms_scale(const float * h, int64_t n, float eps) {
    return 1.0f/sqrtf(mod_dot(h, h, n)/n + eps);
}

float ggml_mod_logit(const float * h, float scale, const float * w, float b, int64_t n) {
    return scale*mod_dot(h, w, n) + b;
}

static void mod_score(ggml_tensor * dst, int ith, int nth, void *) {
    const auto * h = dst->src[0];
    const auto * w = dst->src[1];
    const auto * b = dst->src[2];
    const auto * p = ggml_mod_get_params(dst);

    const int64_t n = h->ne[0];
    for (int64_t i = ith; i < dst->ne[1]; i += nth) {
        const float * x = mod_at<float>(h, 0, i);

        const float scale = ggml_mod_rms_scale(x, n, p->eps);
        for (int64_t u = 0; u < dst->ne[0]; ++u) {
            *mod_at<float>(dst, u, i) = ggml_mod_logit(x, scale, mod_at<float>(w, 0, u), *mod_at<float>(b, u), n);
        }
    }
}

static void mod_assert_router(const ggml_tensor * h, const ggml_tensor * w, const ggml_tensor * b) {
    for (const auto * t : { h, w, b }) {
        GGML_ASSERT(t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[2] == 1 && t->ne[3] == 1);
    }
    GGML_ASSERT(h->ne[0] == w->ne[0]);
    GGML_ASSERT(w->ne[1] == b->ne[0]);
}

ggml_tensor * ggml_mod_score(ggml_context * ctx, ggml_tensor * h, ggml_tensor * w, ggml_tensor * b, float eps) {
    mod_assert_router(h, w, b);

    ggml_tensor * args[] = { h, w, b };
    auto * res = ggml_custom_4d(ctx, GGML_TYPE_F32, w->ne[1], h->ne[1], 1, 1, args, 3, mod_score, GGML_N_TASKS_MAX, nullptr);

    return mod_set_params(res, { MOD_MAGIC, GGML_MOD_OP_SCORE, eps, 0, 0 });
}

//
// decisions
//

static void mod_route(ggml_tensor * dst, int ith, int nth, void *) {
    const auto * h      = dst->src[0];
    const auto * w      = dst->src[1];
    const auto * b      = dst->src[2];
    const auto * limit  = dst->src[3];
    const auto * always = dst->src[4];
    const auto * p      = ggml_mod_get_params(dst);

    const int64_t n        = h->ne[0];
    const int64_t n_tokens = h->ne[1];

    for (int64_t u = ith; u < dst->ne[1]; u += nth) {
        int32_t * count = mod_at<int32_t>(dst, 0, u);
        int32_t * ids   = count + 1;
        float   * score = (float *) (ids + n_tokens);
        float   * gate  = score + n_tokens;

        const float l = *mod_at<float>(limit, u);

        *count = 0;
        for (int64_t i = 0; i < n_tokens; ++i) {
            const float * x = mod_at<float>(h, 0, i);

            score[i] = ggml_mod_logit(x, ggml_mod_rms_scale(x, n, p->eps), mod_at<float>(w, 0, u), *mod_at<float>(b, u), n);
            ids  [i] = -1;
            gate [i] = 0.0f;

            const bool above = score[i] >= l;
            if (above || *mod_at<int32_t>(always, i)) {
                ids[(*count)++] = i;
                gate[i] = p->scale && above && l > -INFINITY ? 1.0f/(1.0f + expf(-score[i])) : 1.0f;
            }
        }
    }
}

ggml_tensor * ggml_mod_route(ggml_context * ctx, ggml_tensor * h, ggml_tensor * w, ggml_tensor * b, ggml_tensor * limit,
        ggml_tensor * always, float eps, bool scale) {
    mod_assert_router(h, w, b);
    GGML_ASSERT(limit->type  == GGML_TYPE_F32 && ggml_is_contiguous(limit)  && limit->ne[0]  == w->ne[1]);
    GGML_ASSERT(always->type == GGML_TYPE_I32 && ggml_is_contiguous(always) && always->ne[0] == h->ne[1]);

    ggml_tensor * args[] = { h, w, b, limit, always };
    auto * res = ggml_custom_4d(ctx, GGML_TYPE_I32, 1 + 3*h->ne[1], w->ne[1], 1, 1, args, 5, mod_route, GGML_N_TASKS_MAX, nullptr);

    return mod_set_params(res, { MOD_MAGIC, GGML_MOD_OP_ROUTE, eps, scale, 0 });
}

//
// rows
//

static void mod_assert_rows(const ggml_tensor * h, const ggml_tensor * route, int unit) {
    GGML_ASSERT(h->type == GGML_TYPE_F32 && h->nb[0] == sizeof(float) && h->ne[2] == 1 && h->ne[3] == 1);
    GGML_ASSERT(route->type == GGML_TYPE_I32 && ggml_is_contiguous(route));
    GGML_ASSERT(route->ne[0] % 3 == 1 && h->ne[1] >= (route->ne[0] - 1)/3);
    GGML_ASSERT(0 <= unit && unit < route->ne[1]);
}

static void mod_gather(ggml_tensor * dst, int ith, int nth, void *) {
    const auto * h     = dst->src[0];
    const auto * route = mod_at<int32_t>(dst->src[1], 0, ggml_mod_get_params(dst)->unit);

    for (int64_t i = ith; i < dst->ne[1]; i += nth) {
        const int32_t id = i < route[0] ? route[1 + i] : 0;

        memcpy(mod_at<float>(dst, 0, i), mod_at<float>(h, 0, id), dst->ne[0]*sizeof(float));
    }
}

ggml_tensor * ggml_mod_gather(ggml_context * ctx, ggml_tensor * h, ggml_tensor * route, int unit) {
    mod_assert_rows(h, route, unit);

    ggml_tensor * args[] = { h, route };
    auto * res = ggml_custom_4d(ctx, GGML_TYPE_F32, h->ne[0], (route->ne[0] - 1)/3, 1, 1, args, 2, mod_gather, GGML_N_TASKS_MAX, nullptr);

    return mod_set_params(res, { MOD_MAGIC, GGML_MOD_OP_GATHER, 0.0f, 0, unit });
}

static void mod_scatter(ggml_tensor * dst, int ith, int nth, void *) {
    const auto * x     = dst->src[1];
    const auto * route = mod_at<int32_t>(dst->src[2], 0, ggml_mod_get_params(dst)->unit);
    const auto * gate  = (const float *) (route + 1 + 2*x->ne[1]);

    for (int64_t i = ith; i < route[0]; i += nth) {
        const int32_t id = route[1 + i];
        const float   g  = gate[id];
        const float * xi = mod_at<float>(x, 0, i);
        float       * hi = mod_at<float>(dst, 0, id);

        for (int64_t j = 0; j < x->ne[0]; ++j) {
            // a hard gate leaves the unit's result as it is
            hi[j] = g == 1.0f ? xi[j] : hi[j] + g*(xi[j] - hi[j]);
        }
    }
}

ggml_tensor * ggml_mod_scatter(ggml_context * ctx, ggml_tensor * h, ggml_tensor * x, ggml_tensor * route, int unit) {
    mod_assert_rows(h, route, unit);
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[2] == 1 && x->ne[3] == 1);
    GGML_ASSERT(x->ne[0] == h->ne[0] && 3*x->ne[1] == route->ne[0] - 1);

    ggml_tensor * args[] = { x, route };
    auto * res = ggml_custom_inplace(ctx, h, args, 2, mod_scatter, GGML_N_TASKS_MAX, nullptr);

    return mod_set_params(res, { MOD_MAGIC, GGML_MOD_OP_SCATTER, 0.0f, 0, unit });
}

//
// mask
//

template <typename T> static void mod_mask_row(ggml_tensor * dst, int64_t i, float q, int64_t seq, T seen, T hidden) {
    T * row = mod_at<T>(dst, 0, i);
    for (int64_t j = 0; j < dst->ne[0]; ++j) {
        const float * cell = mod_at<float>(dst->src[0], 0, j, seq);
        row[j] = cell[0] <= q && q <= cell[1] ? seen : hidden;
    }
}

static void mod_mask(ggml_tensor * dst, int ith, int nth, void *) {
    const auto * pos = dst->src[1];
    const auto * seq = dst->src[2];

    for (int64_t i = ith; i < dst->ne[1]; i += nth) {
        const float   q = *mod_at<int32_t>(pos, i);
        const int64_t s = seq ? *mod_at<int32_t>(seq, i) : 0;
        if (dst->type == GGML_TYPE_F16) {
            mod_mask_row<ggml_fp16_t>(dst, i, q, s, 0, ggml_fp32_to_fp16(-INFINITY));
        } else {
            mod_mask_row<float>(dst, i, q, s, 0.0f, -INFINITY);
        }
    }
}

ggml_tensor * ggml_mod_mask(ggml_context * ctx, ggml_tensor * cells, ggml_tensor * pos, ggml_tensor * seq, ggml_type type, int64_t n_kv) {
    GGML_ASSERT(type == GGML_TYPE_F16 || type == GGML_TYPE_F32);
    GGML_ASSERT(cells->type == GGML_TYPE_F32 && ggml_is_contiguous(cells) && cells->ne[0] == 2 && cells->ne[1] >= n_kv);
    GGML_ASSERT(pos->type == GGML_TYPE_I32 && ggml_is_contiguous(pos));
    GGML_ASSERT(!seq || (seq->type == GGML_TYPE_I32 && ggml_is_contiguous(seq) && seq->ne[0] == pos->ne[0]));

    ggml_tensor * args[] = { cells, pos, seq };
    auto * res = ggml_custom_4d(ctx, type, n_kv, pos->ne[0], 1, 1, args, seq ? 3 : 2, mod_mask, GGML_N_TASKS_MAX, nullptr);

    return mod_set_params(res, { MOD_MAGIC, GGML_MOD_OP_MASK, 0.0f, 0, 0 });
}
