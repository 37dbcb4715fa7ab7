#pragma once

#include "llama-graph.h"

#include <cstdint>
#include <list>
#include <map>
#include <set>
#include <vector>

struct llama_mod_model;

struct llm_mod_graph;
struct llm_mod_segment;

// Who is active. Set anew for each ubatch: thresholds may change between two of them.
struct llama_mod_decider {
    std::vector<float> limit; // [n_units], least logit of an active token
    llama_pos          n_sink = 0;
    bool               forced = false;

    bool active(int32_t u, float score, llama_pos pos) const {
        return score >= limit[u] || pos < n_sink;
    }

    // of an active token with scale_output: 1 where it is active only as a sink, or because it is forced to be
    float gate(int32_t u, float score) const;
};

// A decision inside a graph of one token: scores the units [u0, u1) and switches the nodes of one of them on or off.
struct llm_mod_router {
    llm_mod_segment * seg;

    int32_t u0;
    int32_t u1;
    int32_t unit; // whose nodes are skipped, -1: none (kv units only)

    ggml_tensor * self = nullptr; // the node that decides
    std::vector<ggml_tensor *> nodes;

    // the router at the end of the unit: where the unit is skipped h stays as it is, so this one decides for both
    llm_mod_router * next = nullptr;

    void set(bool on);
    void set_self(bool on);
};

// The part of a model that one graph covers: all of the layers' halves [t0, t1), where 2*il is the attention of
// layer il and 2*il + 1 its FFN. Between segments the residual stream waits in the persistent tensor h.
struct llm_mod_segment {
    const llama_mod_model * model = nullptr;

    int32_t t0 = 0;
    int32_t t1 = 0;

    int32_t unit = -1; // the unit that the segment is, -1: runs for all tokens

    bool first = false; // embeds the tokens
    bool last  = false; // final norm and head

    // kv units inside, whose scores are outputs and whose decisions are applied after the graph has run
    bool kv_inside = false;

    // all units inside, for one token: the routers are nodes of the graph that switch those of their units on or off
    bool skips = false;

    // with skips: the routers do not switch nodes but decide by ggml_mod_route(), and a unit's result is only taken over
    // where it is active. Runs on any device that has the operations
    bool on_device = false;

    // the worst case that is only reserved, never run: one KQ mask serves all layers
    bool reserve = false;

    // the units scored at the end, [u0, u1): those that decide before h changes again for all tokens
    int32_t u0 = 0;
    int32_t u1 = 0;

    ggml_tensor * h = nullptr; // F32 [n_embd, n_ubatch + 1], the last row takes what padding computes

    // the routers; by layer, because each device has a copy
    std::vector<ggml_tensor *> w; // F32 [n_embd, n_units]
    std::vector<ggml_tensor *> b; // F32 [n_units]

    ggml_tensor * routes = nullptr; // I32 [4, n_units], what is decided, with on_device

    float eps = 0.0f; // of the RMS norm

    bool has_ops = false; // all devices of the layers run those of ggml-mod.h

    ggml_cgraph * scratch = nullptr; // takes what is built but is not part of the segment

    // set before each run of a unit's segment
    bool                 gather = false; // rows of h; else the first n_tokens
    std::vector<int32_t> rows;           // [n_tokens]
    std::vector<int32_t> rows_out;       // [n_tokens], differs from rows where these are padded
    std::vector<float>   gate;           // [n_tokens] with scale_output, else empty

    // with skips, set before each run and filled by it
    const llama_mod_decider * decider = nullptr;
    llama_pos                 pos     = 0;
    float *                   score   = nullptr; // [n_units]
    uint8_t *                 active  = nullptr; // [n_units]

    std::list<llm_mod_router> routers;

    // set by the graph: logits of the units [u0, u0 + n), from column i on of t, F32 [n_columns, n_tokens]
    struct scores {
        int32_t u0;
        int32_t n;
        int32_t i;
        ggml_tensor * t;
    };
    std::vector<scores> out;

    // set by the graph: has it been cut wherever it must be? and which layers were seen to have a stream between
    // attention and FFN
    bool              is_whole = false;
    std::set<int32_t> middles;

    llm_mod_graph * graph = nullptr; // while it is built

    // set by the graph: what attends, for graphs whose number of cells is adjusted (see llm_mod_graph_fit)
    std::vector<class llm_graph_input_attn_mod *> attn;
};

// After a graph has been built: from now on its attention takes exactly the range of cells in use, which changes from
// token to token, instead of one rounded up to a multiple of 256. Only for graphs that stay on the CPU.
void llm_mod_graph_fit(llm_mod_segment & seg, ggml_cgraph * gf);

// is that possible? attention must read views of the cache
bool llm_mod_graph_can_fit(const llm_mod_segment & seg, ggml_cgraph * gf);

// the inputs of the graph's attention
std::set<const ggml_tensor *> llm_mod_graph_attn_inputs(const llm_mod_segment & seg);

// Cuts the graphs of all architectures into segments. The functions of llm_graph_context that every architecture builds
// its graph with tell it where the residual stream is; positions are counted in half layers:
//
//   2*il      at the entrance of layer il: what its first norm or projection reads; build_cvec() ends the layer before
//   2*il + 1  between attention and FFN: the tensor that is named llama_mod_arch_middle()
//
// Where the segment begins, the stream becomes the segment's rows of h. What comes before and behind the segment goes to
// a scratch graph that never runs. A tensor that the architecture holds already is replaced in place: nothing but what
// comes later reads it.
struct llm_mod_graph {
    llm_mod_graph(llm_graph_context & g);

    // does what is built now belong to the segment?
    bool is_live() const { return g.gf != seg->scratch; }

    // where to begin and to end the loop over the layers, see llama-mod-layers.h
    bool next_layer(int & il);

    //
    // called by llm_graph_context
    //

    // a norm or a projection reads cur
    void read(ggml_tensor * cur);

    // cur gets a name; false: it needs none
    bool name(ggml_tensor * cur, const char * name, int il);

    // layer il ends; returns the residual stream
    ggml_tensor * leave_layer(ggml_tensor * cur, int il);

    // does the architecture pick the rows that are output?
    bool has_out_ids() const;

    // the states of recurrent layers, in the place of T, one of upstream's inputs for hybrid models. It has no inputs of
    // attention: they are made for each layer
    template <typename T> T * build_inp_hybrid(const llama_ubatch & ubatch);

    // the input of the attention of layer il, with its cache: of K and V, or of K that V is a part of. false: the
    // attention does not belong to the segment
    bool attend(llm_graph_input_attn_kv * & inp, int il);
    bool attend(llm_graph_input_attn_k  * & inp, int il);

    // does each K/V head have cells of its own?
    bool has_parts(int il) const;

    // then: stores K and V, and attends with each part of the heads to its cells; the arguments are those of
    // llm_graph_context::build_attn()
    ggml_tensor * build_parts(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks,
            float kq_scale, int il);

    // stands in for attention that does not belong to the segment
    ggml_tensor * build_no_attn(const ggml_tensor * wo, const ggml_tensor * q, int il) const;

private:
    llm_graph_context & g;
    llm_mod_segment * const seg;

    ggml_cgraph * const gf;     // the segment's
    const char  * const middle; // null: each layer is attention or FFN
    const char  * const end;    // null: build_cvec() ends a layer

    bool   is_looping = false; // the loop over the layers has begun
    bool   is_reading = false; // and its first layer, or what follows the loop, has not read the stream yet
    size_t n_before   = 0;     // bytes of tensors made before the loop

    const ggml_tensor * last = nullptr; // what a segment ends with

    int32_t t_next = 0; // the next position where something is to be done
    void next_cut(int32_t t); // from t on

    // is anything to be done where the stream is at position t?
    bool acts     (int32_t t) const;
    bool replaces (int32_t t) const; // such that another tensor carries on the stream
    bool scores_kv(int32_t t) const;

    // the stream between attention and FFN of layer il, which is at its begin or end where the layer is one of them
    void at_middle(ggml_tensor * cur, int32_t il);

    // is the layer an FFN alone?
    bool is_ffn(int32_t il) const;

    // does it, and returns the residual stream
    ggml_tensor * cut(ggml_tensor * cur, int32_t t);
    void in_place(ggml_tensor * cur, int32_t t);

    ggml_tensor * build_inp();
    ggml_tensor * build_out_rows(ggml_tensor * cur);

    // before and after each half of a layer, t: 2*il attention, 2*il + 1 FFN; both return the residual stream
    ggml_tensor * build_enter(ggml_tensor * cur, int32_t t);
    ggml_tensor * build_leave(ggml_tensor * cur, int32_t t);

    // the end of a segment that is not the last: gate, store in h, score the routers that come next
    void build_end(ggml_tensor * cur);

    ggml_tensor * inp_rows     = nullptr; // I32 [n_tokens]
    ggml_tensor * inp_rows_out = nullptr; // I32 [n_tokens]
    ggml_tensor * inp_gate     = nullptr; // F32 [1, n_tokens]
    ggml_tensor * inp_cur      = nullptr; // the segment's input

    // the unit that is being built inside a graph that skips
    llm_mod_router * router  = nullptr;
    llm_mod_router * left    = nullptr; // the one before
    int              t_leave = -1; // its last half
    int              i_node  = 0;  // its first node

    // the same with on_device
    ggml_tensor * route      = nullptr;
    int           route_unit = 0; // in the route
    ggml_tensor * inp_limit  = nullptr; // F32 [n_units], the decider's
    ggml_tensor * inp_always = nullptr; // I32 [1], is the token a sink?

    // of layer il, or of one of its parts
    llm_graph_input_attn_kv * build_attn_inp(int il, int part = 0);

    std::map<int32_t, llm_graph_input_attn_kv *> inp_attn; // by group of layers that share cells

    std::list<llm_graph_input_attn_k> inp_k; // what attention without V reads of these

    ggml_tensor *             mask_any = nullptr; // the last KQ mask made

    ggml_tensor * k_rot = nullptr; // the last made, for quantised K and V
    ggml_tensor * v_rot = nullptr;

    const ggml_tensor * out_w = nullptr; // the routers of the last scores

    // on the device of layer il
    void build_scores(ggml_tensor * cur, int32_t il, int32_t u0, int32_t u1);

    ggml_tensor * build_router(ggml_tensor * cur, int32_t u0, int32_t u1);
    ggml_tensor * build_route (ggml_tensor * cur, int32_t u0, int32_t u1, int32_t unit);
    ggml_tensor * build_gated (ggml_tensor * cur) const;

    ggml_tensor * view_h() const;
};
