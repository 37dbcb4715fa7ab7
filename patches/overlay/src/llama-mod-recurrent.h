#pragma once

#include "llama-memory-recurrent.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

struct ggml_tensor;
struct llama_cparams;
struct llama_model;

class llama_io_read_i;
class llama_io_write_i;

// The states of recurrent layers, beside the K/V of the others (llama_kv_cache_mod): upstream's memory, which has one
// cell for each sequence, with the state behind its last token.
//
// A state cannot be taken back token by token. So while a decode runs, each of its sequences has a shadow that shares the
// cell that it had before. Upstream's memory then takes another cell for the new state. It reads the old one from
// where it is, as it does anyhow, so this costs a second cell for each sequence, and no time.
class llama_mod_recurrent {
public:
    // throws std::runtime_error where there is no memory, and where a ubatch cannot hold a draft
    llama_mod_recurrent(const llama_model & model, const llama_cparams & cparams);

    // does layer il have a state?
    bool has(int32_t il) const { return mem.r_l[il] != nullptr; }

    // the ubatches of a batch, in which all sequences have equally many tokens; empty on failure
    std::vector<llama_ubatch> split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all);

    //
    // one decode
    //

    // the sequences of the ubatch get the cells that the next graphs write to
    void place(const llama_ubatch & ubatch);

    void keep(); // the decode has succeeded
    void undo(); // it has failed

    // waits for running graphs: cells may have to be swapped between two graphs of a decode
    std::function<void()> synchronize;

    //
    // sequences; what p is said to be is the last position
    //

    // where the sequence can end, at the least, if its last position is p_max. Upstream's memory keeps states of n_rs_seq
    // tokens before, for drafts, but none from before the last ubatch
    llama_pos first_end(llama_seq_id seq_id, llama_pos p_max) const;

    void end   (llama_seq_id seq_id, llama_pos p); // where it can
    void remove(llama_seq_id seq_id);
    void copy  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst);
    void keep  (llama_seq_id seq_id);
    void move  (llama_seq_id seq_id, llama_pos p);
    void clear (bool data);

    // its tokens have other positions now, perhaps a part of them: it ends where it does
    void fix(llama_seq_id seq_id);

    bool has_state(llama_seq_id seq_id) const;

    //
    // for graphs
    //

    // full: as large as it can be
    const llama_memory_recurrent_context * get_context(bool full) const { return full ? &ctx_full : &ctx; }

    // I32 [n_rs]: where the state of each cell from the head on is read from
    const std::vector<int32_t> & get_copies() const { return copies; }

    // upstream's

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const { mem.state_write(io, seq_id); }
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id);

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const { return mem.memory_breakdown(); }

private:
    const uint32_t n_seq_max;

    llama_memory_recurrent         mem; // sequences from n_seq_max on are shadows
    llama_memory_recurrent_context ctx;
    llama_memory_recurrent_context ctx_full;

    std::vector<int32_t> copies;

    std::vector<uint32_t> n_back; // [n_seq_max] tokens whose states before them are there

    // the running decode
    std::vector<bool>     shadowed; // [n_seq_max]
    std::vector<uint32_t> rs_idx;   // upstream's before it, [2*n_seq_max], empty: none runs
    std::vector<uint32_t> n_back_before;

    bool is_known(llama_seq_id seq_id) const { return seq_id >= 0 && (uint32_t) seq_id < n_seq_max; }

    llama_seq_id shadow(llama_seq_id seq_id) const { return seq_id + n_seq_max; }

    // the cell that the s-th sequence of the ubatch alone has, -1: it takes another one
    int32_t find_own(const llama_ubatch & ubatch, uint32_t s) const;

    // from where on the sequences of the ubatch have their cells, or free ones, in a row; -1: nowhere
    int32_t find_row(const llama_ubatch & ubatch) const;

    // makes it so from cell 0 on
    void make_row(const llama_ubatch & ubatch);
    void swap_cells(uint32_t a, uint32_t b);

    uint32_t find_empty(uint32_t first) const;

    // the sequence leaves the cell that it shares, with the state n tokens before the last, at position p
    void leave_shared(llama_seq_id seq_id, uint32_t n, llama_pos p);

    std::vector<ggml_tensor *> tensors() const;
};
