#pragma once

#include "llama-kv-cache.h"
#include "llama-mod-history.h"
#include "llama-mod-mask.h"
#include "llama-mod-origin.h"
#include "llama-mod-recurrent.h"
#include "llama-mod.h"
#include "llama-mod-rows.h"

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

struct llama_cparams;
struct llama_memory_params;
struct llama_mod_model;

//
// llama_kv_cache_mod
//

// ordinary caches for groups of layers: one for all the layers with complete K/V (its cells also say which tokens there
// are, even where no layer is left for it), one for all the layers whose attention is a sliding window or a chunk, and
// one for each layer whose tokens are routed, or for each of its K/V heads where kv units decide about them apart.
// a token that skips a layer takes no cell there. a token that a kv unit drops, and every token in a layer with a
// sliding window, gives its cell back when it has left the window and the rollback margin. all are unified: routed rows
// would break equal splits
//
// recurrent layers have a state for each sequence beside that (llama-mod-recurrent.h). Then a sequence can end only at
// its last token
class llama_kv_cache_mod : public llama_memory_i {
public:
    // throws std::runtime_error for a type of context that has other K/V, and where there is no memory
    llama_kv_cache_mod(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

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

    // of one sequence with LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: a checkpoint
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_mod specific API
    //

    // a layer's K/V heads are in one part, part 0, or each of them is a part

    // the same for what is in the same cells
    int32_t get_group(int32_t il, int32_t part) const;

    // the part's own cache, null: complete K/V
    llama_kv_cache * get_own(int32_t il, int32_t part) const;

    bool has_f32() const; // K or V

    // for how many cells a graph of one token is built. one graph has many caches: without slack, one or the other would
    // outgrow it every few tokens
    enum class slack {
        none, // those in use, rounded up
        fit,  // more: each run adjusts the range that it takes
        room, // some more, whose memory is there: each run takes them all
    };
    void set_slack(slack value);

    // F32/F16 [n_kv, n_tokens]: what the queries see; keys that kv units dropped are hidden from those beyond the window
    // cell: reserved for the token of the ubatch, which sees itself there; -1: none
    void fill_mask(ggml_tensor * mask, const llama_ubatch & ubatch, int32_t il, int32_t part, int32_t cell);

    // cells in use, and the one reserved, end here
    uint32_t get_n_used(int32_t il, int32_t part, int32_t cell) const;

    // free the cells of dropped tokens that nothing can ask for any more: those that the running decode
    // has added, or all once it has succeeded
    void expire(bool all);

    // back to the state before the running decode
    void undo();

    void     set_rollback(uint32_t n);
    uint32_t get_rollback() const;

    // f waits for running graphs: tensors may have to be replaced between two graphs of a decode
    void set_synchronize(const std::function<void()> & f);

    // f says what K/V are computed with now; the types of K and V are filled in here
    void set_origin(const std::function<llama_mod_origin()> & f);

    // null: no layer has a state
    const llama_mod_recurrent * get_recr() const { return recr.get(); }

    // changes when cells have moved or tensors were replaced: graphs and masks made before are void
    uint64_t get_generation() const;

    // il < 0: all layers
    void kv_stats(int32_t il, llama_mod_kv_stats & stats) const;

    void kv_seq_stats(llama_seq_id seq_id, llama_mod_kv_seq_stats & stats) const;

    // the last position at which the sequence cannot end, because the next token would see K/V that are gone; at least
    // seq_pos_min(). that is what llama_memory_seq_pos_min() tells
    llama_pos seq_pos_fixed(llama_seq_id seq_id) const;

    // K of tokens that were moved is to be rotated
    bool has_shift() const;

    // throws std::runtime_error saying why state_read() would refuse a checkpoint
    void checkpoint_check(llama_io_read_i & io, llama_seq_id seq_id);

private:
    friend class llama_kv_cache_mod_context;

    // layers whose tokens are in the same cells, but for those with complete K/V; or a part of one
    struct layer_group {
        int32_t il; // the first one
        int32_t part;

        bool   routed; // the layer's units decide which tokens come in, else all do and all leave the window
        bool   drops;  // some of its tokens are visible in the window only
        size_t window; // index

        std::unique_ptr<llama_mod_rows> rows;
        llama_kv_cache *                kv = nullptr; // of rows

        uint32_t head = 0; // no cell below is free

        std::vector<uint32_t> passing; // cells that the ubatch takes only while the routed layer runs

        llama_mod_mask mask;

        std::unique_ptr<llama_kv_cache_context> one; // see get_one()

        // a cell has become empty
        void emptied(uint32_t idx);
    };

    const llama_mod_model & mod;
    const llama_hparams   & hparams;
    const llama_hparams     hparams_part; // the same with one K/V head

    const uint32_t n_seq_max;
    const uint32_t n_ubatch;
    const bool     swa_full; // a dense model would keep all tokens in layers with a window

    uint32_t rollback   = 64;
    slack    slack_used = slack::none;

    const ggml_type type_k;
    const ggml_type type_v;
    const bool      v_trans; // false too where K alone is stored (MLA)

    // that tokens leave: of layers that attend to a part of the tokens, then those of kv units
    enum { WINDOW_LAYER };
    std::vector<llama_mod_window> windows;

    std::unique_ptr<llama_mod_rows> base_rows;
    llama_kv_cache *                base; // of base_rows
    std::vector<layer_group>        groups;
    std::vector<int32_t>            map_group; // il -> index of its first part, GROUP_BASE, GROUP_NONE

    enum { GROUP_BASE = -1, GROUP_NONE = -2 }; // complete K/V, no K/V

    std::unique_ptr<llama_mod_recurrent> recr;

    llama_mod_mask base_mask;

    void touch_masks();

    // what a sequence has given back of what has left a window
    struct left_info {
        llama_pos freed        = -1; // the largest position whose K/V are gone in some layer
        llama_pos freed_before = -1; // before the running decode
        llama_pos expired      = -1; // no dropped cells are left at or below
        llama_pos expired_new  = -1; // of the running decode
    };

    // per sequence
    struct seq_info {
        std::vector<left_info> left; // by window

        llama_pos before    = -1;    // seq_pos_max before the running decode
        bool      broken    = false; // holds a copy that lacks K/V: it cannot be continued

        // what its K/V were computed with, null: it has no tokens
        std::shared_ptr<const llama_mod_origin> origin;
        std::shared_ptr<const llama_mod_origin> origin_before; // the running decode

        llama_mod_history history;
    };

    std::vector<seq_info> seqs;

    seq_info no_tokens() const;

    std::function<llama_mod_origin()>       make_origin;
    std::shared_ptr<const llama_mod_origin> origin; // the last one, shared by the sequences

    // what K/V are computed with now
    std::shared_ptr<const llama_mod_origin> get_origin();

    // tokens of this origin come to the sequence
    void add_origin(llama_seq_id seq_id, const std::shared_ptr<const llama_mod_origin> & added);

    uint64_t n_compact = 0; // how often cells were moved

    layer_group *       find(int32_t il, int32_t part);
    const layer_group * find(int32_t il, int32_t part) const;

    // the sequence's last position below p0, -1
    llama_pos last_before(llama_seq_id seq_id, llama_pos p0) const;

    // per group: cells of tokens in [p0, p1) that seq_id shares with others, but has given back there already
    std::vector<std::set<uint32_t>> shared_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // tokens of seq_id in [p0, p1), which other sequences may share, are moved `by` so much: from `from` on they are others
    void add_history(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos from, int32_t by);

    // the positions of the states follow those of the tokens
    void move_states();

    // can the sequence go on, with its tail from position p0 on removed?
    bool can_end_at(llama_seq_id seq_id, llama_pos p0) const;

    void seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // what remains of a sequence of which only a part was read
    void forget(llama_seq_id seq_id);

    // take the sequence out of the cells with positions in [p0, p1), of all or of those dropped; returns the last position
    llama_pos free_cells(layer_group & c, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool only_dropped);

    using make_rows_t = std::function<std::unique_ptr<llama_mod_rows>(llama_mod_kv_mode, const llama_hparams &, const llama_kv_cache::layer_filter_cb &)>;

    void init_windows();
    void init_groups (const llama_model & model);
    void init_caches(llama_mod_kv_mode mode, llama_mod_kv_mode mode_part, const make_rows_t & make);

    // dropped tokens at positions below have left the window, and the rollback margin
    llama_pos reach(llama_seq_id seq_id, size_t window) const;

    // is the ubatch's token i, if dropped, out of reach when the ubatch is done?
    bool is_passing(const llama_ubatch & ubatch, uint32_t i, size_t window) const;

    // put the rows of ubatch into cells of the group and commit their memory; empty on failure.
    // dropped: the kv decisions, where they are known before the layer runs, else empty
    llama_kv_cache::slot_info place(layer_group & c, const llama_ubatch & ubatch, const std::vector<uint8_t> & dropped);

    // the layer has run: free the cells of those tokens of the running decode that nothing can ask for any more
    void settle(layer_group & c);

    // the kv decisions of tokens that place() has put into cells
    void set_dropped(layer_group & c, const llama_kv_cache::slot_info & sinfo, const std::vector<uint8_t> & dropped);

    // what place() has put into cells from the i-th on leaves them again
    void take_back(layer_group & c, const llama_kv_cache::slot_info & sinfo, uint32_t i);

    // the cell that the layer's next token takes if it runs the layer, -1: there is none; only occupy() fills it
    int32_t reserve(layer_group & c);
    void    occupy (layer_group & c, int32_t cell, const llama_ubatch & ubatch, bool dropped);

    // for graphs of one token: what the layer attends to with the reserved cell; valid until the next call
    const llama_kv_cache_context * get_one(layer_group & c, int32_t cell);

    // memory without a cell in use goes back to the system
    void trim();

    // move cells together where removals left holes
    void compact(llama_context * lctx);

    template <typename F> void for_each(F f) {
        f(*base);
        for (auto & c : groups) {
            f(*c.kv);
        }
    }

    // throws std::runtime_error where the context would not go on with K/V of the state's origin
    void state_write_origins(llama_io_write_i & io, llama_seq_id seq_id, uint32_t magic) const;
    void state_read_origins (llama_io_read_i  & io,                      uint32_t magic);

    // the tokens of the common cache, cells in the order of llama_kv_cache::state_write()
    void state_write_tokens(llama_io_write_i & io, llama_seq_id seq_id) const;
    void state_read_tokens (llama_io_read_i  & io, const std::vector<uint32_t> & idxs);

    void state_write_info(llama_io_write_i & io, llama_seq_id seq_id) const;
    void state_read_info (llama_io_read_i  & io, llama_seq_id seq_id);

    void state_write_group(llama_io_write_i & io, const layer_group & c, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void state_read_group (llama_io_read_i  & io,       layer_group & c, llama_seq_id seq_id, llama_state_seq_flags flags);

    //
    // checkpoints
    //

    // the first bytes of a state. The second number counts the formats: a state of another one is refused
    static constexpr uint32_t MOD_STATE_MAGIC      = 0x53446f4d; // "MoDS"
    static constexpr uint32_t MOD_CHECKPOINT_MAGIC = 0x43446f4d; // "MoDC"
    static constexpr uint32_t MOD_STATE_VERSION    = 5;

    struct checkpoint {
        struct cell {
            llama_pos         pos;
            llama_kv_cell_ext ext;
        };

        llama_pos pos_max = -1;
        bool      broken  = false;
        uint64_t  digests[2] = {}; // of the tokens without the last one, of all

        std::vector<llama_pos>         freed; // by window
        std::vector<std::vector<cell>> cells; // by group
    };

    // of the tokens below p1 and what was done to them
    uint64_t digest_tokens(llama_seq_id seq_id, llama_pos p1) const;

    // the sequence's cells that will be given back, by index
    std::vector<uint32_t> dropped_cells(const layer_group & c, llama_seq_id seq_id) const;

    // the cells that the sequence leaves before those of a checkpoint come
    std::vector<uint32_t> leaving_cells(const layer_group & c, llama_seq_id seq_id, llama_pos end) const;

    void checkpoint_write      (llama_io_write_i & io, llama_seq_id seq_id) const;
    void checkpoint_write_cells(llama_io_write_i & io, const layer_group & c, const std::vector<uint32_t> & idxs) const;
    void checkpoint_write_data (llama_io_write_i & io, const layer_group & c, const std::vector<uint32_t> & idxs) const;

    // all throw std::runtime_error. until checkpoint_remove() nothing is changed

    checkpoint checkpoint_parse(llama_io_read_i & io);
    void checkpoint_parse_cells(llama_io_read_i & io, const layer_group & c, llama_pos p_max, std::vector<checkpoint::cell> & res) const;

    // the last position that stays: that of the checkpoint's last token, or the one before where it is another token now
    llama_pos checkpoint_end(const checkpoint & ckpt, llama_seq_id seq_id);

    // n cells that are free, or will be
    std::vector<uint32_t> checkpoint_room(const layer_group & c, llama_seq_id seq_id, llama_pos end, size_t n) const;

    void checkpoint_read  (llama_io_read_i & io, llama_seq_id seq_id);
    void checkpoint_remove(llama_seq_id seq_id, llama_pos end);
    void checkpoint_place (llama_io_read_i & io, layer_group & c, llama_seq_id seq_id, const std::vector<checkpoint::cell> & cells_in, const std::vector<uint32_t> & idxs);
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
    // routed layers aside, which are placed as the routers decide; false where memory is short
    bool apply() override;

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    //
    // llama_kv_cache_mod_context specific API
    //

    llama_kv_cache_mod * get_kv() const { return kv; }

    uint32_t get_n_tokens() const { return n_tokens; } // of the whole batch
    bool     is_last()      const { return n_done == n_tokens; }
    bool     is_full()      const { return is_full_cache; }

    const llama_kv_cache_context * get_layer(int32_t il, int32_t part) const;

    // what is in the same group shares cells, and with them the inputs of attention
    int32_t get_group(int32_t il, int32_t part) const;

    // see llama_kv_cache_mod; layers that are not routed have their cells already, and nothing is to be done for them
    bool place      (int32_t il, int32_t part, const llama_ubatch & ubatch, const std::vector<uint8_t> & dropped);
    void settle     (int32_t il, int32_t part);
    void set_dropped(int32_t il, int32_t part, const std::vector<uint8_t> & dropped);
    void take_back  (int32_t il, int32_t part, uint32_t i);
    bool reserve    (int32_t il, int32_t part);
    void occupy     (int32_t il, int32_t part, bool dropped);
    void fill_mask  (ggml_tensor * mask, const llama_ubatch & ubatch, int32_t il, int32_t part) const;

    int32_t  get_cell  (int32_t il, int32_t part) const; // reserved, -1: none
    uint32_t get_n_used(int32_t il, int32_t part) const;

private:
    llama_memory_status status;

    llama_kv_cache_mod * kv = nullptr;

    bool is_full_cache = false;

    llama_memory_context_ptr base;

    struct group {
        std::unique_ptr<llama_kv_cache_context> ctx;
        llama_kv_cache::slot_info               sinfo;

        int32_t cell = -1; // reserved
    };
    std::vector<group> groups; // as in llama_kv_cache_mod

    // put the rows of ubatch into cells of the i-th group
    bool place_one(size_t i, const llama_ubatch & ubatch, const std::vector<uint8_t> & dropped);

    // of all groups that are not routed
    bool place_all();

    // the group of a part of a routed layer, else -1
    int32_t find_routed(int32_t il, int32_t part) const;

    // update: those that have something to do
    std::vector<llama_memory_context_ptr> updates;
    llama_context * lctx = nullptr;

    uint32_t n_tokens = 0;
    uint32_t n_done   = 0; // with the current ubatch
};
