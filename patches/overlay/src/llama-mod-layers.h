#pragma once

#include <cstdint>

struct llm_mod_segment;

// The number of layers, as the graphs of all architectures see it. The loop of each of them,
//
//   for (int il = 0; il < n_layer; ++il)
//
// visits the layers of the segment that a graph covers, which the comparison sees to.
struct llm_mod_layers {
    const int64_t           n;
    llm_mod_segment * const seg; // null: all layers

    llm_mod_layers(int64_t n, llm_mod_segment * seg) : n(n), seg(seg) {}

    operator int64_t() const { return n; }
};

// The loop's condition. Where the loop begins it moves il to the segment's first layer.
bool operator<(int & il, const llm_mod_layers & layers);
