#pragma once

#include "llama-kv-cache.h"

#include <functional>
#include <memory>
#include <vector>

struct llama_mod_kv_stats;

// how the memory of a cache follows its cells
enum llama_mod_kv_mode {
    LLAMA_MOD_KV_LAZY, // address space for all cells, memory is committed as they are used
    LLAMA_MOD_KV_GROW, // small tensors that are replaced by larger ones, rows copied, as cells are used
    LLAMA_MOD_KV_FULL, // all memory from the start
    LLAMA_MOD_KV_POOL, // like grow, and the tensors of all caches share pages
};

// One cache and the memory behind its K and V rows.
// Graphs may read the rows [0, n_kv), so these are usable whenever one runs; the others may not be touched.
// A transposed V (no flash attention) holds numbers of all cells on each page: only its size can follow, by growth.
class llama_mod_rows {
public:
    using make_t = std::function<std::unique_ptr<llama_kv_cache>(uint32_t kv_size)>;

    // what suits the buffers of the model's caches, or LLAMA_MOD_KV asks for, and why.
    // throws std::runtime_error for an unknown value
    static std::pair<llama_mod_kv_mode, const char *> choose_mode(const llama_model & model, bool v_trans, bool offload);

    // that of a cache of one K/V head, where the others have `mode`: on a device its pages would be too large for it
    static llama_mod_kv_mode choose_part_mode(llama_mod_kv_mode mode, const llama_model & model, bool offload);

    static const char * mode_name(llama_mod_kv_mode mode);

    // the memory of a cache's tensors that would be of type buft, as long as the cache is made; ordinary caches keep buft
    static ggml_backend_buffer_type_t choose_buft(ggml_backend_buffer_type_t buft);

    // throws std::runtime_error if there is no memory or no address space
    llama_mod_rows(llama_mod_kv_mode mode, uint32_t kv_size, make_t make);

    std::unique_ptr<llama_kv_cache> kv;

    // waits for running graphs, before tensors are replaced
    std::function<void()> synchronize;

    // makes the rows of cells [0, n) usable, and those that graphs read with them; false: out of memory, nothing changed
    bool reserve(uint32_t n);

    // gives back the memory behind the last cell in use, and of whole pages of free cells among them
    void trim();

    // the part of trim() that is behind the last cell in use
    void trim_tail();

    // when growing: smaller tensors, where a third of the rows is not needed
    void shrink();

    // removes a sequence of which only a part was restored. zeroes its rows: without flash attention a NaN in a free
    // cell would reach every query. allocates nothing, since there may be no memory
    void wipe(llama_seq_id seq_id);

    // would it pay to compact?
    bool is_sparse() const;

    // if so: moves the last cells into the first free ones and gives back the memory behind. no shift may be pending
    void compact();

    // how often the tensors were replaced: graphs that were built on others are void
    uint32_t get_n_grown() const { return n_grown; }

    // of K and V of one token
    size_t bytes_per_cell() const;

    // adds those of layer il, of all with il < 0
    void add_stats(int32_t il, llama_mod_kv_stats & stats) const;

private:
    const make_t            make;
    const llama_mod_kv_mode mode;

    bool grows() const { return mode == LLAMA_MOD_KV_GROW || mode == LLAMA_MOD_KV_POOL; }

    std::unique_ptr<llama_kv_cache> make_cache(uint32_t n) const;

    uint32_t n_rows;       // of the tensors
    uint32_t n_usable = 0; // of these

    uint32_t n_grown = 0;

    const llama_mod_cells & cells() const;

    bool grow(uint32_t n);
    bool replace(uint32_t n);

    bool is_transposed(const llama_kv_cache::kv_layer & l, const ggml_tensor * t) const { return t == l.v && kv->v_trans; }

    void move_rows(const std::vector<std::pair<uint32_t, uint32_t>> & moves);

    // f(buffer, data, size) for the rows [i0, i1) of each tensor; a transposed V has no rows, only all of it
    template <typename F> void for_rows(uint32_t i0, uint32_t i1, F f) const;
};
