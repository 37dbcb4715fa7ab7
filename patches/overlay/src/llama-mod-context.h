#pragma once

#include "llama-graph.h"
#include "llama-mod-graph.h"
#include "llama-mod-io.h"
#include "llama-mod-origin.h"
#include "llama-mod.h"

#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

struct llama_context;
struct llama_memory_i;
struct llama_mod_model;

class llama_kv_cache_mod;
class llama_kv_cache_mod_context;

// what llama_memory_seq_pos_min() tells of any memory: in a MoD memory see llama_kv_cache_mod::seq_pos_fixed()
llama_pos llama_mod_seq_pos_min(const llama_memory_i & mem, llama_seq_id seq_id);

// Runs a MoD model so that nothing is computed where nothing is active, in one of two ways.
//
// One token on the CPU: a single graph of the whole model, whose routers are nodes that switch those of their unit on
// or off. Every layer gets a cell before the graph runs; the cells of skipped layers are taken back after it.
//
// Else segment by segment: the host reads the routers' scores after a segment, decides which tokens the next unit runs
// for, and hands only these to it.
//
// Graphs of small batches (decode) are kept, each with a scheduler of its own: built once, then reused. Segments of
// larger ones (prefill) share the context's scheduler and are built anew, which costs nothing against the work. While
// a kept scheduler works it stands in for the context's own, so that all of llama_context's code (graph callbacks,
// output extraction, synchronize) finds the tensors that it asks for.
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

    // a state of the memory is to be written, of whose tokens none may wait to be moved
    void before_state();

    // the segment that the next graph covers; the whole model while compute buffers are reserved
    llm_mod_segment * get_segment();

    llm_graph_result * process_ubatch(const llama_ubatch & ubatch, llm_graph_type gtype, llama_memory_context_i * mctx, ggml_status & ret);

    // without the abort callback
    bool run_whole(const std::function<bool()> & f);

    // a failed decode leaves the state as it was; returns the result of llama_decode
    int32_t fail(ggml_status status);

    // throw std::runtime_error where draft heads cannot read the hidden state behind the last layer, or the input of layer
    // il, which is what the last layer puts out where il is the number of layers
    void check_last_state() const;
    void check_layer_input(uint32_t il) const;

    // copies the inputs of layers that are asked for, of the last ubatch, to where the context keeps those of the batch,
    // from token_offset on; false: none are asked for
    bool extract_layer_inputs(size_t token_offset, size_t n_tokens) const;

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

    // what K/V are computed with now
    llama_mod_origin get_origin();

private:
    llama_context & lctx;

    const int32_t n_units;

    llama_pos kv_window_min = 0; // of all kv units, 0: there are none

    // the residual stream
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    // the routers on each device that has layers
    std::map<ggml_backend_dev_t, std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> routers;

    llm_mod_segment whole;

    // all backends are the CPU: nodes can be switched and fitted between two runs of a graph
    const bool is_cpu;

    // LLAMA_MOD_DECODE=graph: one token is one graph on a device that skips inside it, too, and on the CPU the one that
    // the device would run; until a graph turns out to be cut inside a unit
    bool on_device;

    // what LLAMA_MOD_INPUTS says: inputs of kept graphs in one block, which is what devices get, also on the CPU; or
    // each copied by the scheduler
    enum class io { unset, block, each };
    const io inputs;

    llama_mod_outputs outputs; // of one segment

    bool fits = false; // all attention of a graph of one token can be fitted
    bool can_fit() const;

    // a graph that is kept
    struct variant {
        llm_mod_segment        seg;
        ggml_backend_sched_ptr sched;
        llm_graph_result_ptr   res;
        std::unique_ptr<llama_mod_inputs> inputs; // null: the scheduler copies each
        bool                   built = false;
        uint64_t               generation = 0; // of the K/V that it was built on
    };

    bool has_states(const llm_mod_segment & seg) const;

    // where recurrent layers write their states, which graphs depend on; 0: the segment has none
    uint32_t get_head(const llm_mod_segment & seg) const;

    // the whole model for one token, by the head of its states
    std::map<uint32_t, std::unique_ptr<variant>> skipping;

    // a segment, its graphs for small batches by (number of rows, are they gathered, head)
    struct piece {
        llm_mod_segment seg;
        size_t          n_tensors = 0; // that a graph reads, or that building it makes
        std::map<std::tuple<uint32_t, bool, uint32_t>, std::unique_ptr<variant>> variants;
    };

    // the model cut at every decision, and without the cuts that only kv units need
    std::vector<piece> plan_cut;
    std::vector<piece> plan_joined;

    llm_graph_result_ptr res_shared;

    // whose inputs the backend samplers write: those of the graph that was built last
    const llm_graph_result * res_sampled = nullptr;

    llm_mod_segment * cur = nullptr; // the segment being built or run

    // the scheduler that the context uses now is this one's; the context's own waits in its place
    variant * swapped = nullptr;

    bool no_slot = false;

    // a digest of LoRA adapters and the control vector, while it is known
    uint64_t adapters       = 0;
    bool     knows_adapters = false;

    void digest_adapters();

    // the current ubatch
    llama_mod_decider    decider;
    std::vector<float>   scores; // [n_tokens][n_units], logits
    std::vector<uint8_t> active; // [n_tokens][n_units]

    struct layer_input {
        bool               known = false; // can the architecture's graph have it?
        std::vector<float> data;          // [n_tokens][n_embd], of the current ubatch, where it is asked for
    };
    std::vector<layer_input> layer_inputs; // [n_layer + 1]

    bool knows_last_state = false;

    void init_hidden(const llm_graph_result & res); // of the whole model, all hidden states asked for
    void check_hidden(const std::string & what, bool known) const;

    // which of the inputs that are asked for the segment's graph has. The one that a segment begins with is in h
    std::vector<bool> find_layer_inputs(const llm_mod_segment & seg) const;

    void read_layer_input (int32_t il, ggml_backend_t backend, const ggml_tensor * t, uint32_t n_tokens);
    void read_stream      (const llm_mod_segment & seg, uint32_t n_tokens); // before the segment runs
    void read_layer_inputs(const llm_graph_params & params);                // after it has run

    // the running decode, [n_tokens][n_units] in batch order
    std::vector<float>   batch_score;
    std::vector<uint8_t> batch_active;

    // takes what is built but not part of the segment
    ggml_context_ptr     ctx_scratch;
    std::vector<uint8_t> buf_scratch;

    // the memory of inputs that a graph does not read: upstream's code fills all that it has made
    std::vector<ggml_backend_buffer_ptr> unread;

    bool bind_unread(const llm_graph_result & res);

    void init_tensors();
    void init_routers(ggml_backend_dev_t dev); // of the next layer
    void init_scratch();
    void init_plan(std::vector<piece> & plan, bool cut_kv, const std::set<int32_t> & middles);

    // Builds the graph of each segment once. throws std::runtime_error where one would read more than weights, the cache,
    // positions and h, or where the architecture cannot be cut at its bounds
    void   check_segments();
    size_t check_segment (llm_mod_segment & seg, llm_graph_params & params) const; // returns the number of its tensors

    void set_decider();

    void read_routes(const llm_mod_segment & seg);

    // null where the device has no backend of its own
    ggml_backend_t get_backend(ggml_backend_dev_t dev) const;

    // whose memory the inputs of a segment's graphs go to in one block, null: each goes its way
    ggml_backend_t get_input_backend(const llm_mod_segment & seg) const;

    // is each unit of the graph for one token on one backend? cut, it would run whatever is decided
    bool has_whole_units(ggml_cgraph * gf) const;

    bool can_skip(const llama_ubatch & ubatch) const;
    bool can_join(const llama_ubatch & ubatch) const;

    std::unique_ptr<variant> make_variant(const llm_mod_segment & seg, size_t n_nodes) const;
    variant & get_variant(piece & p, uint32_t n_rows, bool gather);

    // all false on failure, with ret set; what they allocate may throw std::bad_alloc

    bool run(const llama_ubatch & ubatch, llm_graph_type gtype, llama_kv_cache_mod_context * mctx, ggml_status & ret);

    // also false, with nothing done and nothing failed, where a layer is full (it may not need the cell), and where the
    // graph would be cut
    bool run_skipping(const llama_ubatch & ubatch, llm_graph_params & params, llama_kv_cache_mod_context * mctx, ggml_status & ret);

    bool run_pieces(const llama_ubatch & ubatch, llm_graph_params & params, llama_kv_cache_mod_context * mctx, ggml_status & ret);
    bool run_piece(piece & p, const llama_ubatch & ubatch, llm_graph_params & params, llama_kv_cache_mod_context * mctx, bool cache, ggml_status & ret);

    bool compute(variant * v, llm_mod_segment & seg, llm_graph_params & params, ggml_status & ret);
    bool build  (variant * v, llm_graph_result * res, llm_graph_params & params, ggml_status & ret);

    bool place_layers(const llm_mod_segment & seg, const std::vector<int32_t> & rows, const llama_ubatch & sub,
            llama_kv_cache_mod_context * mctx);

    std::vector<uint8_t> get_dropped(int32_t il, int32_t part, const std::vector<int32_t> & rows) const;

    void read_scores(const llm_mod_segment & seg, const std::vector<int32_t> & rows, const llama_ubatch & ubatch);

    void record(const llama_ubatch & ubatch, uint32_t n_tokens_batch);
    void commit();

    llm_graph_result * res_last = nullptr;
};
