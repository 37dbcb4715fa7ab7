#pragma once

#include "llama-mod.h"

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;
struct llama_model_loader;

const char * llama_mod_kind_name(llama_mod_kind kind);

// the routed units of a model, as read from its file (schema version 1)
struct llama_mod_model {
    bool     scale_output = false;
    uint32_t n_sink       = 0;
    uint32_t kv_window    = 0; // 0: no kv units

    // of what decides the K/V of a token: hyperparameters, routers, samples of the weights. All weights would have to be
    // read for more
    uint64_t digest = 0;

    // in the order in which they decide: by layer, within a layer kv, block, attn, ffn
    std::vector<llama_mod_unit> units;

    // the routers, x^ . w + b
    std::vector<float> w; // [n_units][n_embd]
    std::vector<float> b; // [n_units]

    // [n_layer], by kind: the unit's number, -1: not routed
    std::vector<std::array<int32_t, 4>> by_layer;

    int32_t find(int32_t il, llama_mod_kind kind) const {
        return il >= 0 && il < (int32_t) by_layer.size() ? by_layer[il][kind] : -1;
    }

    // layers whose K/V need cells of their own
    bool has_cells(int32_t il) const;

    // where unit u decides, in half layers: 2*il at the entrance of layer il, 2*il + 1 at that of its FFN
    int32_t pos(int32_t u) const;

    // the first unit that decides at position t or later
    int32_t first(int32_t t) const;
};

// reads and checks the routers; null for a dense file
// throws std::runtime_error naming the key or tensor that is wrong
std::unique_ptr<llama_mod_model> llama_mod_model_load(const llama_model & model, llama_model_loader & ml);
