#pragma once

#include "llama-kv-cache.h"
#include "llama-mod.h"

#include <array>
#include <bitset>
#include <memory>
#include <vector>

struct llama_mod_model;

//
// llama_kv_cache_mod
//

// one ordinary cache for all the layers with complete K/V, and one for each layer whose tokens are routed:
// a token that skips a layer takes no cell there, and a token that a kv unit drops gives its cell back when it has
// left the window and the rollback margin. all are unified: routed rows would break equal splits
class llama_kv_cache_mod : public llama_memory_i {
public:
    llama_kv_cache_mod(
            const llama_model & model,
                    ggml_type   type_k,
                    ggml_type   type_v,
                         bool   v_trans,
                         bool   offload,
                     uint32_t   kv_size,
                     uint32_t   n_seq_max);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    // false, and nothing is changed, where the next query would need K/V that are gone
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_mod specific API
    //

    // the layer's own cache, null: complete K/V
    llama_kv_cache * get_own(int32_t il) const;

    // put the rows of ubatch into cells of the layer's own cache; empty on failure
    llama_kv_cache::slot_info place(int32_t il, const llama_ubatch & ubatch);

    // the kv decisions of tokens that place() has put into cells
    void set_dropped(int32_t il, const llama_kv_cache::slot_info & sinfo, const std::vector<uint8_t> & dropped);

    // hide dropped keys out of the window; mask F32/F16 [n_kv, n_tokens]
    void hide_dropped(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t il) const;

    // free the cells of dropped tokens that nothing can ask for any more: those that the running decode
    // has added, or all once it has succeeded
    void expire(bool all);

    // back to the state before the running decode
    void undo();

    void     set_rollback(uint32_t n);
    uint32_t get_rollback() const;

    // il < 0: all layers
    void kv_stats(int32_t il, llama_mod_kv_stats & stats) const;

private:
    friend class llama_kv_cache_mod_context;

    struct own_cache {
        int32_t il;
        bool    drops; // the layer has a kv unit

        std::unique_ptr<llama_kv_cache> kv;

        std::vector<uint8_t> dropped; // [kv_size], per cell: visible in the window only
        uint32_t             head;    // no cell below is free
    };

    const llama_mod_model & mod;
    const llama_hparams   & hparams;

    const uint32_t n_seq_max;

    uint32_t rollback = 64;

    std::unique_ptr<llama_kv_cache> base;
    std::vector<own_cache>          own;
    std::vector<int32_t>            map_own; // il -> index, -1

    // per sequence
    struct seq_info {
        llama_pos freed        = -1; // the largest position whose K/V a kv unit has given back in some layer
        llama_pos expired      = -1; // no dropped cells are left at or below
        llama_pos before       = -1; // seq_pos_max before the running decode
        llama_pos freed_before = -1; // freed before the running decode
        bool      broken    = false; // holds a copy that lacks K/V: it cannot be continued
    };

    std::array<seq_info, LLAMA_MAX_SEQ> seqs;

    own_cache *       find(int32_t il);
    const own_cache * find(int32_t il) const;

    // can the sequence go on at position p0, with its tail removed?
    bool can_end_at(llama_seq_id seq_id, llama_pos p0) const;

    void seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // take the sequence out of the cells with positions in [p0, p1), of all or of those dropped; returns the last position
    llama_pos free_cells(own_cache & c, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool only_dropped);

    // memory of cells behind the last one in use goes back to the system
    void trim();

    void kv_stats_add(const llama_kv_cache & kv, int32_t il, llama_mod_kv_stats & stats) const;

    template <typename F> void for_each(F f) {
        f(*base);
        for (auto & c : own) {
            f(*c.kv);
        }
    }

    void state_write_own(llama_io_write_i & io, const own_cache & c, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void state_read_own (llama_io_read_i  & io,       own_cache & c, llama_seq_id seq_id, llama_state_seq_flags flags);
};

class llama_kv_cache_mod_context : public llama_memory_context_i {
public:
    // used for errors
    llama_kv_cache_mod_context(llama_memory_status status);

    // used to create a full-cache context
    llama_kv_cache_mod_context(llama_kv_cache_mod * kv);

    // used to create an update context
    llama_kv_cache_mod_context(llama_kv_cache_mod * kv, llama_context * lctx, bool optimize);

    // used to create a batch processing context from a batch
    llama_kv_cache_mod_context(llama_kv_cache_mod * kv, llama_memory_context_ptr base, uint32_t n_tokens);

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override; // the complete layers only: the others are placed as the routers decide

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    //
    // llama_kv_cache_mod_context specific API
    //

    llama_kv_cache_mod * get_kv() const { return kv; }

    uint32_t get_n_tokens() const { return n_tokens; } // of the whole batch
    bool     is_last()      const { return n_done == n_tokens; }

    const llama_kv_cache_context * get_layer(int32_t il) const;

    // see llama_kv_cache_mod
    bool place(int32_t il, const llama_ubatch & ubatch);
    void set_dropped (int32_t il, const std::vector<uint8_t> & dropped);
    void hide_dropped(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t il) const;

private:
    llama_memory_status status;

    llama_kv_cache_mod * kv = nullptr;

    llama_memory_context_ptr base;

    struct layer {
        std::unique_ptr<llama_kv_cache_context> ctx;
        llama_kv_cache::slot_info               sinfo;
    };
    std::vector<layer> own; // as in llama_kv_cache_mod

    // update: those that have something to do
    std::vector<llama_memory_context_ptr> updates;

    uint32_t n_tokens = 0;
    uint32_t n_done   = 0; // with the current ubatch
};
