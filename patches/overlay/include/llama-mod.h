#pragma once

// Mixture-of-Depths: inspect and steer the routed units of a model, count what they skip.
//
// A unit is (layer, kind), or (layer, kv, head) where each K/V head is remembered or forgotten by itself. Units are
// numbered in the order in which they decide: by layer, within a layer kv (by head), block, attn, ffn. A dense model
// has 0 units; on its contexts the getters return 0 (or false) and the setters LLAMA_MOD_ERR_NOT_MOD.

#include "llama.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

    enum llama_mod_kind {
        LLAMA_MOD_KIND_BLOCK = 0, // the whole layer
        LLAMA_MOD_KIND_ATTN  = 1, // the attention sublayer
        LLAMA_MOD_KIND_FFN   = 2, // the FFN sublayer
        LLAMA_MOD_KIND_KV    = 3, // being remembered beyond the recent window
    };

    enum llama_mod_force {
        LLAMA_MOD_FORCE_NONE     = 0, // the routers decide
        LLAMA_MOD_FORCE_ACTIVE   = 1, // every unit runs for every token: the dense model
        LLAMA_MOD_FORCE_INACTIVE = 2, // no unit runs for any token, sinks included: the floor of the cost
    };

    enum llama_mod_err {
        LLAMA_MOD_OK          =  0,
        LLAMA_MOD_ERR_NOT_MOD = -1, // the model has no routers
        LLAMA_MOD_ERR_UNIT    = -2, // no unit with this number
        LLAMA_MOD_ERR_VALUE   = -3, // the value is out of its range
        LLAMA_MOD_ERR_ADAPTER = -4, // the routers cannot be put beside the model; the log says why
    };

    struct llama_mod_unit {
        int32_t             layer;
        enum llama_mod_kind kind;
        int32_t             head;       // the K/V head that it decides about, -1: all of the layer
        float               threshold;  // p of the file, in (0, 1)
        float               activation; // share of tokens active on calibration text, in [0, 1]
        int32_t             window;     // kv: the recent tokens that are seen in any case, else 0
    };

    struct llama_mod_unit_stats {
        uint64_t n_seen;   // tokens that met the unit's router
        uint64_t n_active; // of these, tokens that ran the unit (kv: that stay remembered)
    };

    struct llama_mod_kv_stats {
        uint64_t n_cells;         // cells reserved, summed over layers, and over K/V heads that have cells of their own
        uint64_t n_used;          // cells in use, summed likewise
        uint64_t bytes_per_cell;  // K and V of one token (of all counted layers together)
        uint64_t bytes_reserved;  // address space
        uint64_t bytes_committed; // memory that the operating system has backed with pages
        uint64_t bytes_used;      // K and V of the cells in use
    };

    struct llama_mod_kv_seq_stats {
        uint64_t n_tokens;    // of the sequence
        uint64_t bytes_used;  // K and V of its cells; those that it shares count for each of their sequences
        uint64_t bytes_dense; // what the dense model would hold for as many tokens
    };

    struct llama_mod_perf {
        uint64_t n_decode;        // successful calls of llama_decode
        uint64_t n_tokens;
        uint64_t n_graphs;        // graphs computed
        uint64_t n_graphs_reused; // of these, without being built again

        // of these, graphs of small batches (decode), which are kept; and those of them that were built again after
        // their first time, because the range of cells outgrew what they were built for
        uint64_t n_graphs_small;
        uint64_t n_graphs_resized;

        // where the time went, in microseconds
        uint64_t us_route;   // forming the batches of active tokens
        uint64_t us_slots;   // finding, freeing and marking KV cells
        uint64_t us_build;   // building and allocating graphs
        uint64_t us_inputs;  // masks, positions, indices
        uint64_t us_compute; // running graphs
        uint64_t us_read;    // reading scores back
    };

    // of this file: counted up with each change that a caller has to know of
    LLAMA_API int32_t llama_mod_api_version(void);
#define LLAMA_MOD_API_VERSION 2

    // routers of a GGUF file beside the model's (adapter.type "mod"), for a model that has none and no context yet. They are
    // checked as those in a model's file are, and must have been made for this model. path NULL: the file that the
    // environment variable LLAMA_MOD_ADAPTER names, if any. The model is as before where they are refused
    LLAMA_API int32_t llama_mod_adapter_load(struct llama_model * model, const char * path);

    // the model's units
    LLAMA_API int32_t llama_mod_n_units  (const struct llama_model * model);
    LLAMA_API bool    llama_mod_get_unit (const struct llama_model * model, int32_t i, struct llama_mod_unit * unit);
    LLAMA_API int32_t llama_mod_kv_window(const struct llama_model * model); // tokens, the largest; 0: no kv units
    LLAMA_API int32_t llama_mod_n_sink   (const struct llama_model * model); // first positions, always active

    // of any model: how many tokens the attention of layer il sees at most; 0: all of them
    LLAMA_API int32_t llama_mod_layer_window(const struct llama_model * model, int32_t il);

    // thresholds, for the tokens decoded from now on: a token is active where logit(score) >= logit(p) + shift
    LLAMA_API float   llama_mod_get_threshold(const struct llama_context * ctx, int32_t i);
    LLAMA_API int32_t llama_mod_set_threshold(      struct llama_context * ctx, int32_t i, float p); // 0 < p < 1
    LLAMA_API float   llama_mod_get_shift    (const struct llama_context * ctx);
    LLAMA_API int32_t llama_mod_set_shift    (      struct llama_context * ctx, float shift);        // finite
    LLAMA_API enum llama_mod_force llama_mod_get_force(const struct llama_context * ctx);
    LLAMA_API int32_t              llama_mod_set_force(      struct llama_context * ctx, enum llama_mod_force force);

    // a state (llama_state_*) holds what its K/V were computed with: the model, thresholds, shift, force, RoPE, adapters,
    // types of K and V. It is refused, and nothing is changed, by a context that has others, and by every context where
    // some of a sequence's tokens were decoded with others than the rest

    // K/V that no later token sees are given back, so a sequence cannot end anywhere: llama_memory_seq_rm() refuses to
    // remove a tail from position p on exactly where llama_memory_seq_pos_min() >= p. To go back further there are
    // checkpoints, worth making where llama_mod_kv_window() > 0, and where layers have windows: states of one sequence with
    // LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY. They hold what would be given back, and are small. Restoring one brings the
    // sequence back to its last token, and removes what has come since. The sequence must still hold the checkpoint's
    // tokens (the last one may be another one now, and is then removed too), made with what the context would make them
    // with now. Else the checkpoint is refused and nothing is changed, which this tells beforehand:
    LLAMA_API bool llama_mod_checkpoint_fits(struct llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq_id);

    // how many positions of a sequence's tail can be taken back exactly (kv units; default 64)
    LLAMA_API int32_t llama_mod_get_kv_rollback(const struct llama_context * ctx);
    LLAMA_API int32_t llama_mod_set_kv_rollback(      struct llama_context * ctx, int32_t n);        // n >= 0

    // of any model: run graphs with fewer threads while other processes need the processors; off at first. How attention
    // over a long context adds up depends on the number of threads, so results may differ in their last bits.
    // Returns false for a model on a GPU, where the time of processors says nothing.
    LLAMA_API bool    llama_mod_set_adaptive_threads(struct llama_context * ctx, bool enabled);
    LLAMA_API int32_t llama_mod_n_threads(const struct llama_context * ctx); // of the last graph; 0 before the first

    // counters since the context's start or the last reset
    LLAMA_API bool llama_mod_get_unit_stats(const struct llama_context * ctx, int32_t i, struct llama_mod_unit_stats * stats);
    LLAMA_API bool llama_mod_get_perf      (const struct llama_context * ctx, struct llama_mod_perf * perf);
    LLAMA_API void llama_mod_reset_stats   (      struct llama_context * ctx);

    // KV memory of one layer, of all layers with il = -1; in a layer with complete K/V, its share of the common cache
    LLAMA_API bool llama_mod_get_kv_stats(const struct llama_context * ctx, int32_t il, struct llama_mod_kv_stats * stats);

    // of one sequence; false where there is none
    LLAMA_API bool llama_mod_get_kv_seq_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct llama_mod_kv_seq_stats * stats);

    // decisions of the last successful llama_decode, tokens in the order of its batch; returns the number of tokens
    //   active [n_tokens][n_units]: 1 or 0
    //   score  [n_tokens][n_units]: the router's logit, x^ . w + b
    // either pointer may be NULL; the arrays belong to the context and live until its next decode
    LLAMA_API int32_t llama_mod_get_trace(const struct llama_context * ctx, const uint8_t ** active, const float ** score);

#ifdef __cplusplus
}
#endif
