#pragma once

#include "llama-graph.h"

#include <cstdint>
#include <vector>

struct llama_mod_model;

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

    // the worst case that is only reserved, never run: one KQ mask serves all layers
    bool reserve = false;

    // the units scored at the end, [u0, u1): those that decide before h changes again for all tokens
    int32_t u0 = 0;
    int32_t u1 = 0;

    ggml_tensor * h = nullptr; // F32 [n_embd, n_ubatch]
    ggml_tensor * w = nullptr; // F32 [n_embd, n_units]
    ggml_tensor * b = nullptr; // F32 [n_units]

    // set before each run of a unit's segment
    bool                 gather = false; // rows of h; else the first n_tokens
    std::vector<int32_t> rows;           // [n_tokens]
    std::vector<float>   gate;           // [n_tokens] with scale_output, else empty

    // set by the graph: logits of the units [u0, u0 + n), F32 [n, n_tokens]
    struct scores {
        int32_t u0;
        int32_t n;
        ggml_tensor * t;
    };
    std::vector<scores> out;
};

// What a MoD-aware architecture asks while it builds its graph. Without a segment everything is as in upstream's code.
struct llm_mod_graph {
    llm_mod_graph(const llm_graph_context & g);

    // which parts of the model belong to the graph
    bool has_attn() const;       // any attention at all
    bool has_attn(int il) const;
    bool has_ffn (int il) const;
    bool has_head() const;

    // the embeddings, or the segment's rows of h
    ggml_tensor * build_inp(ggml_tensor * tok_embd);

    // the rows that are output, where the last layer's attention comes no more
    ggml_tensor * build_out_rows(ggml_tensor * cur, ggml_tensor * inp_out_ids) const;

    // the cache that layer il attends to
    llm_graph_input_attn_kv * build_attn_inp(llm_graph_input_attn_kv * inp, ggml_tensor * cur, int il);

    // the end of a segment that is not the last: gate, store in h, score the routers that come next
    void build_end(ggml_tensor * cur);

private:
    const llm_graph_context & g;
    llm_mod_segment * const   seg;

    ggml_tensor * inp_rows = nullptr; // I32 [n_tokens]
    ggml_tensor * inp_gate = nullptr; // F32 [1, n_tokens]
    ggml_tensor * inp_cur  = nullptr; // the segment's input

    llm_graph_input_attn_kv * inp_base = nullptr; // shared by the layers with complete K/V
    ggml_tensor *             mask_any = nullptr; // the last KQ mask made

    void build_scores(ggml_tensor * cur, int32_t u0, int32_t u1);
};
