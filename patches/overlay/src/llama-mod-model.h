#pragma once

#include "llama-mod.h"

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct ggml_tensor;
struct gguf_context;
struct llama_cparams;
struct llama_model;
struct llama_model_loader;

const char * llama_mod_kind_name(llama_mod_kind kind);

// the routed units of a model, as read from its file or one beside it (schema versions 1 and 2)
struct llama_mod_model {
    bool     scale_output = false;
    uint32_t n_sink       = 0;
    uint32_t kv_window    = 0; // the largest of the kv units, 0: there are none

    // K/V heads that decide apart, each with cells of its own, in layers with kv units; 1: they decide together
    int32_t n_heads = 1;

    // of what decides the K/V of a token: the routers, and llama_mod_base::digest
    uint64_t digest = 0;

    // in the order in which they decide: by layer, within a layer kv (by head), block, attn, ffn
    std::vector<llama_mod_unit> units;

    // the routers, x^ . w + b
    std::vector<float> w; // [n_units][n_embd]
    std::vector<float> b; // [n_units]

    // [n_layer], by kind: the number of the first unit, -1: not routed
    std::vector<std::array<int32_t, 4>> by_layer;

    // the layer's unit of the kind, the first one of kv
    int32_t find(int32_t il, llama_mod_kind kind) const {
        return il >= 0 && il < (int32_t) by_layer.size() ? by_layer[il][kind] : -1;
    }

    // [n_layer][n_heads]: the number of the kv unit, -1: none; empty where the layer has none
    std::vector<std::vector<int32_t>> kv_by_head;

    // the unit that decides about a K/V head, -1: all is remembered
    int32_t find_kv(int32_t il, int32_t head) const {
        const bool has = il >= 0 && il < (int32_t) kv_by_head.size() && head >= 0 && head < (int32_t) kv_by_head[il].size();
        return has ? kv_by_head[il][head] : -1;
    }

    // how many kv units the layer has
    int32_t n_kv(int32_t il) const;

    // layers whose K/V need cells of their own
    bool has_cells(int32_t il) const;

    // into how many parts of the K/V heads the layer's cells are divided
    int32_t n_parts(int32_t il) const { return find(il, LLAMA_MOD_KIND_KV) >= 0 ? n_heads : 1; }

    // what graphs need for them beyond the nodes of the dense model
    uint32_t n_nodes() const;

    // where unit u decides, in half layers: 2*il at the entrance of layer il, 2*il + 1 at that of its FFN
    int32_t pos(int32_t u) const;

    // the first unit that decides at position t or later
    int32_t first(int32_t t) const;

    // throws std::runtime_error naming a unit of another kind than kv: with them, draft heads that read the hidden states
    // of the tokens (MTP, EAGLE-3, DFlash) are not possible
    void check_hidden() const;
};

// the file that routers are read from
struct llama_mod_source {
    const gguf_context * metadata;
    const std::string    arch; // general.architecture

    llama_mod_source(const gguf_context * metadata, const std::string & arch) : metadata(metadata), arch(arch) {}
    virtual ~llama_mod_source() = default;

    virtual std::vector<std::string> names() const = 0; // of all tensors
    virtual const ggml_tensor * find(const std::string & name) const = 0; // null: there is none
    virtual void read(const ggml_tensor * t, void * dst) = 0; // the bytes of a tensor that find() returned
};

// reads and checks the routers for a model whose weights are loaded; it needs model.mod_base
// throws std::runtime_error naming the key or tensor that is wrong
std::unique_ptr<llama_mod_model> llama_mod_model_read(const llama_model & model, llama_mod_source & source);

// has a context of the model routers? not one of draft heads, whose layers lie behind the routed ones.
// throws std::runtime_error where draft heads are not possible beside the routers
bool llama_mod_model_routes(const llama_model & model, const llama_cparams & cparams);

// sets mod_base of a model, and mod where its own file has routers
void llama_mod_model_load(llama_model & model, llama_model_loader & ml);
