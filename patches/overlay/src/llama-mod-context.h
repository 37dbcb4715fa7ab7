#pragma once

#include "llama-graph.h"
#include "llama-mod-graph.h"
#include "llama-mod.h"

#include "ggml-cpp.h"

#include <map>
#include <memory>
#include <vector>

struct llama_context;
struct llama_mod_model;

class llama_kv_cache_mod;
class llama_kv_cache_mod_context;

// Runs a MoD model segment by segment. The host reads the routers' scores after a segment, decides which tokens the
// next unit runs for, and hands only these to it. Nothing runs where nothing is active.
//
// Small batches (decode) keep a scheduler and a graph for every segment and number of rows: built once, then reused.
// Larger ones (prefill) share the context's scheduler and build each segment's graph anew, which costs nothing
// against the work. While a cached scheduler works it stands in for the context's own, so that all of llama_context's
// code (graph callbacks, output extraction, synchronize) finds the tensors that it asks for.
struct llama_mod_context {
    llama_mod_context(llama_context & lctx);
    ~llama_mod_context();

    //
    // called by llama_context
    //

    // the context's own scheduler is needed: at the start of a decode, before a memory update
    void restore_sched();

    // cached graphs are no longer valid (adapters, samplers, ...)
    void reset();

    // the segment that the next graph covers; the whole model while compute buffers are reserved
    llm_mod_segment * get_segment();

    llm_graph_result * process_ubatch(const llama_ubatch & ubatch, llm_graph_type gtype, llama_memory_context_i * mctx, ggml_status & ret);

    // a failed decode leaves the state as it was; returns the result of llama_decode
    int32_t fail(ggml_status status);

    //
    // llama-mod.h
    //

    const llama_mod_model & model;

    std::vector<float> thresholds; // [n_units], p
    float              shift = 0.0f;
    llama_mod_force    force = LLAMA_MOD_FORCE_NONE;

    std::vector<llama_mod_unit_stats> stats; // [n_units]
    llama_mod_perf perf = {};

    // of the last successful decode, [n_tokens][n_units]
    std::vector<float>   trace_score;
    std::vector<uint8_t> trace_active;

    llama_kv_cache_mod * get_memory() const;

private:
    llama_context & lctx;

    const int32_t n_units;

    // router weights and the residual stream
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    llm_mod_segment whole;

    // a graph that is kept
    struct variant {
        llm_mod_segment        seg;
        ggml_backend_sched_ptr sched;
        llm_graph_result_ptr   res;
        bool                   built = false;
    };

    // a segment, its graphs for small batches by (number of rows, are they gathered)
    struct piece {
        llm_mod_segment seg;
        std::map<std::pair<uint32_t, bool>, std::unique_ptr<variant>> variants;
    };

    // the model cut at every decision, and without the cuts that only kv units need
    std::vector<piece> plan_cut;
    std::vector<piece> plan_joined;

    llm_graph_result_ptr res_shared;

    llm_mod_segment * cur = nullptr; // the segment being built or run

    // the scheduler that the context uses now is this one's; the context's own waits in its place
    variant * swapped = nullptr;

    bool no_slot = false;

    // the current ubatch
    std::vector<float> scores; // [n_tokens][n_units], logits

    // the running decode, [n_tokens][n_units] in batch order
    std::vector<float>   batch_score;
    std::vector<uint8_t> batch_active;

    void init_tensors();
    void init_plan(std::vector<piece> & plan, bool cut_kv);

    bool  is_active(int32_t u, float score, llama_pos pos) const;
    float gate_of  (int32_t u, float score) const;

    bool can_join(const llama_ubatch & ubatch) const;

    // all false on failure, with ret set
    bool run_piece(piece & p, const llama_ubatch & ubatch, llm_graph_params & params, llama_kv_cache_mod_context * mctx, bool cache, ggml_status & ret);
    bool compute(llm_mod_segment & seg, llm_graph_result * res, bool & built, llm_graph_params & params, ggml_status & ret);

    bool place_layers(const llm_mod_segment & seg, const std::vector<int32_t> & rows, const llama_ubatch & sub,
            const llama_ubatch & ubatch, llama_kv_cache_mod_context * mctx);

    void drop_layer(int32_t il, const std::vector<int32_t> & rows, const llama_ubatch & ubatch, llama_kv_cache_mod_context * mctx) const;

    void read_scores(const llm_mod_segment & seg, const std::vector<int32_t> & rows);

    variant & get_variant(piece & p, uint32_t n_rows, bool gather);

    void record(const llama_ubatch & ubatch, uint32_t n_tokens_batch);
    void commit();

    llm_graph_result * res_last = nullptr;
};
