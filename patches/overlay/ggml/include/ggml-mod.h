#pragma once

#include "ggml.h"
#include "ggml-backend.h"

// Ops of Mixture-of-Depths models.
//
// All are GGML_OP_CUSTOM with a mark in their parameters. The CPU backend runs them like any custom op; a backend with
// kernels of its own recognises the mark. So ggml's list of ops, which all backends and the RPC protocol count, stays as
// it is, and a backend that knows nothing of them refuses them as it refuses every custom op.

#ifdef  __cplusplus
extern "C" {
#endif

// the name under which a backend's registry has an address, if its devices run these ops
#define GGML_MOD_OPS_PROC "ggml_backend_mod_ops"

// the name under which it has a ggml_mod_skips_t: can its devices skip what lies between a ggml_mod_route() of one token
// and its ggml_mod_scatter()? Others compute it whatever is decided
#define GGML_MOD_SKIPS_PROC "ggml_backend_mod_skips"

typedef bool (*ggml_mod_skips_t)(void);

enum ggml_mod_op {
    GGML_MOD_OP_SCORE,
    GGML_MOD_OP_ROUTE,
    GGML_MOD_OP_GATHER,
    GGML_MOD_OP_SCATTER,
    GGML_MOD_OP_MASK,
};

// behind the custom op's own parameters
struct ggml_mod_params {
    uint32_t magic;
    int32_t  op;    // enum ggml_mod_op
    float    eps;   // SCORE, ROUTE: of the RMS norm
    int32_t  scale; // ROUTE: are outputs scaled with the score?
    int32_t  unit;  // GATHER, SCATTER: which column of the route
};

// NULL if t is something else
GGML_API const struct ggml_mod_params * ggml_mod_get_params(const struct ggml_tensor * t);

// On CPUs flash attention turns quantised K and V into numbers once for each query. After this it does so once for each
// tile of queries, as it does with F16, where there are queries enough. attn: what ggml_flash_attn_ext() returned
GGML_API void ggml_mod_set_tiles(struct ggml_tensor * attn);
GGML_API bool ggml_mod_has_tiles(const struct ggml_tensor * attn);

// h:   F32 [n_embd, n_tokens]
// w:   F32 [n_embd, n_units]
// b:   F32 [n_units]
// res: F32 [n_units, n_tokens], rms_norm(h) . w + b
// computed in F32 by the same sums for any n_tokens: a token's decision must not depend on its batch
GGML_API struct ggml_tensor * ggml_mod_score(
        struct ggml_context * ctx,
        struct ggml_tensor  * h,
        struct ggml_tensor  * w,
        struct ggml_tensor  * b,
        float                 eps);

// decides on the device who is active: score >= limit, or always
//
// limit:  F32 [n_units], -INFINITY: all are active, and not scaled
// always: I32 [n_tokens], not 0: active whatever the score (sinks)
// res:    I32 [1 + 3*n_tokens, n_units], for each unit:
//           [1]        n, the number of active tokens
//           [n_tokens] their indices in ascending order, then -1
//           [n_tokens] scores (bits of F32)
//           [n_tokens] gates (bits of F32): 0 where inactive; where active 1, or with scale sigmoid(score) unless the
//                      token is active for another reason
GGML_API struct ggml_tensor * ggml_mod_route(
        struct ggml_context * ctx,
        struct ggml_tensor  * h,
        struct ggml_tensor  * w,
        struct ggml_tensor  * b,
        struct ggml_tensor  * limit,
        struct ggml_tensor  * always,
        float                 eps,
        bool                  scale);

// h:   F32 [n_embd, n_rows], n_rows >= n_tokens
// res: F32 [n_embd, n_tokens], the rows of the unit's active tokens, then copies of h's first row: what is computed of
//      these must be finite, and a norm with an eps of 0 makes NaN of zeros
GGML_API struct ggml_tensor * ggml_mod_gather(
        struct ggml_context * ctx,
        struct ggml_tensor  * h,
        struct ggml_tensor  * route,
        int                   unit);

// the way back, in place: h += gate*(x - h) in the rows of the unit's active tokens
//
// x:   F32 [n_embd, n_tokens]
// res: view of h
GGML_API struct ggml_tensor * ggml_mod_scatter(
        struct ggml_context * ctx,
        struct ggml_tensor  * h,
        struct ggml_tensor  * x,
        struct ggml_tensor  * route,
        int                   unit);

// KQ mask from the cells in use
//
// cells: F32 [2, n_cells, n_seqs], positions of the first and the last query that sees the cell. A kept cell is seen by
//        all from its own position on (last: INFINITY), one that has been dropped by those in its window, an empty one
//        by none (first: INFINITY)
// pos:   I32 [n_tokens]
// seq:   I32 [n_tokens], which table of cells, NULL: the first
// res:   F16 or F32 [n_kv, n_tokens], 0 where seen, else -INFINITY; n_kv <= n_cells
GGML_API struct ggml_tensor * ggml_mod_mask(
        struct ggml_context * ctx,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * seq,
        enum ggml_type        type,
        int64_t               n_kv);

// what SCORE and ROUTE compute on the CPU, for one token

// 1/RMS
GGML_API float ggml_mod_rms_scale(const float * h, int64_t n, float eps);

GGML_API float ggml_mod_logit(const float * h, float scale, const float * w, float b, int64_t n);

// Device memory that is reserved as addresses and committed page by page, for K/V that grow with use. Commit and release
// take any range inside a buffer; the device must not be writing there. Committed pages read as zeros at first.
struct ggml_mod_vmm {
    // NULL: the device has no virtual memory
    ggml_backend_buffer_type_t (*buffer_type)(ggml_backend_dev_t dev);

    // was the buffer allocated by such a type? the other functions take no others
    bool   (*is_vmm) (ggml_backend_buffer_t buf);

    // all pages that the range touches; false: out of memory, nothing changed
    bool   (*commit) (ggml_backend_buffer_t buf, void * data, size_t size);

    // the pages that lie inside, once the device is idle
    void   (*release)(ggml_backend_buffer_t buf, void * data, size_t size);

    // bytes of the committed pages that begin in the range
    size_t (*backed) (ggml_backend_buffer_t buf, const void * data, size_t size);
};

// the name under which a backend's registry has a const struct ggml_mod_vmm *
#define GGML_MOD_VMM_PROC "ggml_backend_mod_vmm"

#ifdef  __cplusplus
}
#endif
