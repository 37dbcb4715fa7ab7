#include "llama-kv-cache-mod.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-mod-buffer.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

static constexpr llama_pos POS_MAX = std::numeric_limits<llama_pos>::max();

// memory is given back to the system when more than this many tokens are removed at once
static constexpr llama_pos MOD_N_TRIM = 64;

//
// llama_kv_cache_mod
//

llama_kv_cache_mod::llama_kv_cache_mod(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
                     bool   v_trans,
                     bool   offload,
                 uint32_t   kv_size,
                 uint32_t   n_seq_max) :
    mod(*model.mod), hparams(model.hparams), n_seq_max(n_seq_max) {

    const auto make = [&](const layer_filter_cb & filter) {
        return std::make_unique<llama_kv_cache>(model, model.hparams, type_k, type_v, v_trans, offload, /*unified =*/ true,
                kv_size, n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE, nullptr, filter, nullptr, nullptr);
    };

    const int32_t n_layer = hparams.n_layer();

    base = make([&](int32_t il) { return il < n_layer && !mod.has_cells(il); });

    map_own.assign(n_layer, -1);
    for (int32_t il = 0; il < n_layer; ++il) {
        if (mod.has_cells(il)) {
            map_own[il] = own.size();
            own.push_back({ il, mod.find(il, LLAMA_MOD_KIND_KV) >= 0, make([il](int32_t i) { return i == il; }),
                    std::vector<uint8_t>(kv_size, 0), 0 });
        }
    }
}

llama_kv_cache_mod::own_cache * llama_kv_cache_mod::find(int32_t il) {
    const int32_t i = map_own.at(il);
    return i < 0 ? nullptr : &own[i];
}

const llama_kv_cache_mod::own_cache * llama_kv_cache_mod::find(int32_t il) const {
    const int32_t i = map_own.at(il);
    return i < 0 ? nullptr : &own[i];
}

llama_kv_cache * llama_kv_cache_mod::get_own(int32_t il) const {
    const auto * c = find(il);
    return c ? c->kv.get() : nullptr;
}

llama_memory_context_ptr llama_kv_cache_mod::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    const auto fail = [] {
        return std::make_unique<llama_kv_cache_mod_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    const llama_batch & batch = balloc.get_batch();
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            if (seqs[batch.seq_id[i][s]].broken) {
                LLAMA_LOG_ERROR("%s: sequence %d is a copy that ends where K/V are gone: remove it and process its tokens again\n",
                        __func__, batch.seq_id[i][s]);
                return std::make_unique<llama_kv_cache_mod_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
            }
        }
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        seqs[s].before       = base->seq_pos_max(s);
        seqs[s].freed_before = seqs[s].freed;
    }

    auto ctx = base->init_batch(balloc, n_ubatch, embd_all);
    if (!ctx || llama_memory_status_is_fail(ctx->get_status())) {
        return fail();
    }

    return std::make_unique<llama_kv_cache_mod_context>(this, std::move(ctx), balloc.get_n_tokens());
}

llama_memory_context_ptr llama_kv_cache_mod::init_full() {
    return std::make_unique<llama_kv_cache_mod_context>(this);
}

llama_memory_context_ptr llama_kv_cache_mod::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_kv_cache_mod_context>(this, lctx, optimize);
}

bool llama_kv_cache_mod::get_can_shift() const {
    return base->get_can_shift();
}

void llama_kv_cache_mod::clear(bool data) {
    for_each([&](llama_kv_cache & kv) { kv.clear(data); });

    for (auto & c : own) {
        std::fill(c.dropped.begin(), c.dropped.end(), 0);
        c.head = 0;
    }
    seqs.fill({});

    if (!data) {
        trim();
    }
}

bool llama_kv_cache_mod::can_end_at(llama_seq_id seq_id, llama_pos p0) const {
    // the next query, at p0, sees dropped keys at p0 - kv_window + 1 and later
    return seqs[seq_id].freed < 0 || seqs[seq_id].freed <= p0 - (llama_pos) mod.kv_window;
}

void llama_kv_cache_mod::seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    base->seq_rm(seq_id, p0, p1);
    for (auto & c : own) {
        free_cells(c, seq_id, p0, p1, false);
    }

    auto & s = seqs[seq_id];
    const llama_pos p_max = base->seq_pos_max(seq_id);
    if (p_max < 0) {
        s = {};
    }
    s.expired = std::min(s.expired, p_max);
}

bool llama_kv_cache_mod::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(seq_id >= -1 && seq_id < (llama_seq_id) seqs.size());

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? POS_MAX : p1;

    const llama_seq_id s0 = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (llama_seq_id) seqs.size() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos p_max = base->seq_pos_max(s);
        const bool is_tail = p0 <= p_max && p_max < p1 && base->seq_pos_min(s) < p0;
        if (is_tail && !can_end_at(s, p0)) {
            return false;
        }
    }

    llama_pos n_tail = 0;
    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos p_max = base->seq_pos_max(s);
        if (p_max < p0) {
            if (p_max < 0) {
                seqs[s] = {};
            }
            continue;
        }
        seq_rm_one(s, p0, p1);
        if (p_max < p1) {
            n_tail = std::max(n_tail, p_max + 1 - p0);
            // can_end_at() held
            seqs[s].broken = false;
        }
    }

    // not for the token or two that a sampler takes back
    if (n_tail > MOD_N_TRIM) {
        trim();
    }

    return true;
}

void llama_kv_cache_mod::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const auto & src = seqs[seq_id_src];
    auto       & dst = seqs[seq_id_dst];

    const bool had = base->seq_pos_max(seq_id_dst) >= 0;

    for_each([&](llama_kv_cache & kv) { kv.seq_cp(seq_id_src, seq_id_dst, p0, p1); });

    const llama_pos p_max = base->seq_pos_max(seq_id_dst);
    if (p_max < 0) {
        dst = {};
        return;
    }

    dst.freed   = std::max(dst.freed, src.freed);
    dst.expired = std::min(had ? std::min(dst.expired, src.expired) : src.expired, p_max);
    dst.broken  = dst.broken || src.broken;

    if (p_max < base->seq_pos_max(seq_id_src) && !can_end_at(seq_id_dst, p_max + 1)) {
        LLAMA_LOG_ERROR("%s: sequence %d cannot be continued from position %d: K/V that the next token would see are gone\n",
                __func__, seq_id_dst, p_max + 1);
        dst.broken = true;
    }
}

void llama_kv_cache_mod::seq_keep(llama_seq_id seq_id) {
    for_each([&](llama_kv_cache & kv) { kv.seq_keep(seq_id); });

    for (auto & c : own) {
        c.head = 0;
    }
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (s != seq_id) {
            seqs[s] = {};
        }
    }

    trim();
}

void llama_kv_cache_mod::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_ASSERT(seq_id >= 0 && seq_id < (llama_seq_id) seqs.size());

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? POS_MAX : p1;
    if (p0 >= p1 || shift == 0) {
        return;
    }

    // the last position before the range that the sequence has: what was removed between them is gone for good
    const auto & sp = base->get_cells(seq_id).seq_pos_get(seq_id);
    const auto   it = sp.lower_bound({ p0, 0 });
    const llama_pos below = it == sp.begin() ? -1 : std::prev(it)->first;

    for_each([&](llama_kv_cache & kv) { kv.seq_add(seq_id, p0, p1, shift); });

    for (auto & c : own) {
        c.head = 0;
    }

    // cells may be shared: they move for all their sequences
    for (llama_seq_id i = 0; i < (llama_seq_id) seqs.size(); ++i) {
        auto & s = seqs[i];
        s.expired = std::max(-1, s.expired + std::min(shift, 0));
        if (i == seq_id && s.freed >= p0 && s.freed < p1) {
            s.freed = std::max(s.freed + shift, below);
        } else if (s.freed >= p0 && shift > 0) {
            s.freed = std::max(s.freed, std::min(s.freed, p1 - 1) + shift);
        }
    }
}

void llama_kv_cache_mod::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    for_each([&](llama_kv_cache & kv) { kv.seq_div(seq_id, p0, p1, d); });

    // what was freed stays the upper bound that it was; cells may be shared
    for (auto & s : seqs) {
        s.expired = -1;
    }
}

llama_pos llama_kv_cache_mod::seq_pos_min(llama_seq_id seq_id) const {
    return base->seq_pos_min(seq_id);
}

llama_pos llama_kv_cache_mod::seq_pos_max(llama_seq_id seq_id) const {
    return base->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_mod::memory_breakdown() const {
    auto res = base->memory_breakdown();
    for (const auto & c : own) {
        for (const auto & [buft, size] : c.kv->memory_breakdown()) {
            res[buft] += size;
        }
    }
    return res;
}

llama_kv_cache::slot_info llama_kv_cache_mod::place(int32_t il, const llama_ubatch & ubatch) {
    auto & c = *find(il);

    // always the first free cells: the range in use stays compact, and with it the time of attention
    c.kv->v_heads[0] = c.head;

    auto sinfo = c.kv->find_slot(ubatch, false);
    if (!sinfo.empty()) {
        for (const uint32_t idx : sinfo.idxs[0]) {
            c.dropped[idx] = 0;
        }
        c.head = sinfo.idxs[0].back() + 1;
    }

    return sinfo;
}

void llama_kv_cache_mod::set_dropped(int32_t il, const llama_kv_cache::slot_info & sinfo, const std::vector<uint8_t> & dropped) {
    auto & c = *find(il);

    GGML_ASSERT(sinfo.idxs[0].size() == dropped.size());
    for (size_t i = 0; i < dropped.size(); ++i) {
        c.dropped[sinfo.idxs[0][i]] = dropped[i];
    }
}

template <typename T>
static void mask_hide(ggml_tensor * mask, uint32_t i, T value, llama_pos p_end, const std::vector<std::pair<llama_pos, uint32_t>> & cells) {
    T * row = (T *) ((char *) mask->data + i*mask->nb[1]);
    for (const auto & [pos, idx] : cells) {
        if (pos > p_end) {
            break;
        }
        if (idx < mask->ne[0]) {
            row[idx] = value;
        }
    }
}

void llama_kv_cache_mod::hide_dropped(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t il) const {
    const auto * c = find(il);
    if (!c || !c->drops) {
        return;
    }

    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

    const auto & cells = c->kv->get_cells(0);

    // dropped cells by position, once for each sequence
    std::map<llama_seq_id, std::vector<std::pair<llama_pos, uint32_t>>> dropped;

    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        const llama_seq_id s = ubatch->seq_id[i][0];

        const auto [it, is_new] = dropped.try_emplace(s);
        if (is_new) {
            const auto & sp = cells.seq_pos_get(s);
            for (auto p = sp.lower_bound({ seqs[s].expired + 1, 0 }); p != sp.end(); ++p) {
                if (c->dropped[p->second]) {
                    it->second.push_back(*p);
                }
            }
        }

        const llama_pos p_end = ubatch->pos[i] - (llama_pos) mod.kv_window;
        if (mask->type == GGML_TYPE_F16) {
            mask_hide<ggml_fp16_t>(mask, i, ggml_fp32_to_fp16(-INFINITY), p_end, it->second);
        } else {
            mask_hide<float>(mask, i, -INFINITY, p_end, it->second);
        }
    }
}

llama_pos llama_kv_cache_mod::free_cells(own_cache & c, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool only_dropped) {
    auto & cells = c.kv->v_cells[0];

    std::vector<uint32_t> idxs;
    llama_pos last = -1;

    // by position: a scan of all cells of all layers would cost more than a decode
    const auto & sp = cells.seq_pos_get(seq_id);
    for (auto p = sp.lower_bound({ p0, 0 }); p != sp.end() && p->first < p1; ++p) {
        if (!only_dropped || c.dropped[p->second]) {
            idxs.push_back(p->second);
            last = p->first;
        }
    }

    for (const uint32_t idx : idxs) {
        if (cells.seq_rm(idx, seq_id)) {
            c.dropped[idx] = 0;
            c.head = std::min(c.head, idx);
        }
    }

    return last;
}

void llama_kv_cache_mod::expire(bool all) {
    if (mod.kv_window == 0) {
        return;
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        auto & info = seqs[s];

        const llama_pos p_max = base->seq_pos_max(s);
        if (p_max <= info.before) {
            continue;
        }

        const llama_pos p0 = all ? info.expired + 1 : info.before + 1;
        const llama_pos p1 = p_max + 2 - (llama_pos) (mod.kv_window + rollback);
        if (p0 >= p1) {
            continue;
        }

        for (auto & c : own) {
            if (c.drops) {
                info.freed = std::max(info.freed, free_cells(c, s, p0, p1, true));
            }
        }
        if (all) {
            info.expired = std::max(info.expired, p1 - 1);
        }
    }
}

void llama_kv_cache_mod::undo() {
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        const auto info = seqs[s];
        if (base->seq_pos_max(s) > info.before) {
            seq_rm_one(s, info.before + 1, POS_MAX);
            // a failed decode has freed none but its own cells
            seqs[s].freed = info.freed_before;
        }
    }
}

void llama_kv_cache_mod::set_rollback(uint32_t n) {
    rollback = n;
}

uint32_t llama_kv_cache_mod::get_rollback() const {
    return rollback;
}

//
// memory
//

void llama_kv_cache_mod::trim() {
    for_each([](llama_kv_cache & kv) {
        const size_t n_used = kv.v_cells[0].used_max_p1();
        for (auto & l : kv.layers) {
            for (auto * t : { l.k, l.v }) {
                if (!t || (t == l.v && kv.v_trans && n_used > 0)) {
                    continue; // a transposed row of V holds one number of every cell
                }
                const size_t offs = t == l.v && kv.v_trans ? 0 : n_used*t->nb[1];
                llama_mod_kv_decommit(t->buffer, (char *) t->data + offs, ggml_nbytes(t) - offs);
            }
        }
    });
}

void llama_kv_cache_mod::kv_stats_add(const llama_kv_cache & kv, int32_t il, llama_mod_kv_stats & stats) const {
    const auto & cells = kv.v_cells[0];

    for (const auto & l : kv.layers) {
        if (il >= 0 && (int32_t) l.il != il) {
            continue;
        }

        size_t per_cell = 0;
        for (const auto * t : { l.k, l.v }) {
            if (t) {
                per_cell              += ggml_nbytes(t)/cells.size();
                stats.bytes_committed += llama_mod_kv_committed(t->buffer, t->data, ggml_nbytes(t));
            }
        }

        stats.n_cells        += cells.size();
        stats.n_used         += cells.get_used();
        stats.bytes_per_cell += per_cell;
        stats.bytes_reserved += per_cell*cells.size();
        stats.bytes_used     += per_cell*cells.get_used();
    }
}

void llama_kv_cache_mod::kv_stats(int32_t il, llama_mod_kv_stats & stats) const {
    stats = {};
    kv_stats_add(*base, il, stats);
    for (const auto & c : own) {
        kv_stats_add(*c.kv, il, stats);
    }
}

//
// state
//

void llama_kv_cache_mod::state_write_own(llama_io_write_i & io, const own_cache & c, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    io.write(&c.il, sizeof(c.il));
    c.kv->state_write(io, seq_id, flags);

    // the decisions, cells in the order of llama_kv_cache::state_write()
    const auto & cells = c.kv->get_cells(0);

    std::vector<uint8_t> dropped;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && (seq_id == -1 || cells.seq_has(i, seq_id))) {
            dropped.push_back(c.dropped[i]);
        }
    }

    const uint32_t n = dropped.size();
    io.write(&n, sizeof(n));
    io.write(dropped.data(), n);
}

void llama_kv_cache_mod::state_read_own(llama_io_read_i & io, own_cache & c, llama_seq_id seq_id, llama_state_seq_flags flags) {
    int32_t il;
    io.read(&il, sizeof(il));
    if (il != c.il) {
        throw std::runtime_error("mod: the state belongs to a model with other routed layers");
    }

    c.kv->state_clear(seq_id);
    c.head = 0;

    llama_kv_cache::slot_info_vec_t sinfos;
    c.kv->state_read_sinfo(io, seq_id, flags, &sinfos, nullptr);

    uint32_t n;
    io.read(&n, sizeof(n));

    const std::vector<uint32_t> idxs = sinfos[0].empty() ? std::vector<uint32_t>() : sinfos[0].idxs[0];
    if (n != idxs.size()) {
        throw std::runtime_error("mod: the state's decisions do not match its cells");
    }

    std::vector<uint8_t> dropped(n);
    io.read(dropped.data(), n);
    for (uint32_t i = 0; i < n; ++i) {
        c.dropped[idxs[i]] = dropped[i] != 0;
        if (seq_id >= 0 && c.kv->get_cells(0).pos_get(idxs[i]) > base->seq_pos_max(seq_id)) {
            throw std::runtime_error("mod: the state's layers do not match");
        }
    }
}

void llama_kv_cache_mod::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    base->state_write(io, seq_id, flags);

    const uint32_t n_own = own.size();
    io.write(&n_own, sizeof(n_own));

    for (const auto & c : own) {
        state_write_own(io, c, seq_id, flags);
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seq_id == -1 || s == seq_id) {
            const int32_t info[2] = { seqs[s].freed, seqs[s].broken };
            io.write(info, sizeof(info));
        }
    }
}

void llama_kv_cache_mod::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    try {
        // upstream leaves the cells alone where the state holds none for the sequence
        base->state_clear(seq_id);
        base->state_read(io, seq_id, flags);

        uint32_t n_own;
        io.read(&n_own, sizeof(n_own));
        if (n_own != own.size()) {
            throw std::runtime_error("mod: the state belongs to a model with other routed layers");
        }

        for (auto & c : own) {
            state_read_own(io, c, seq_id, flags);
        }

        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
            if (seq_id == -1 || s == seq_id) {
                int32_t info[2];
                io.read(info, sizeof(info));

                seqs[s] = {};
                if (base->seq_pos_max(s) >= 0) {
                    seqs[s].freed  = std::max(-1, info[0]);
                    seqs[s].broken = info[1] != 0;
                }
            }
        }
    } catch (...) {
        // never leave a state of which some layers are missing
        if (seq_id == -1) {
            clear(true);
        } else {
            // zeroes what has been restored too: without flash attention a NaN in a free cell would reach every query
            for_each([&](llama_kv_cache & kv) { kv.state_clear(seq_id); });
            for (auto & c : own) {
                c.head = 0;
            }
            seqs[seq_id] = {};
        }
        throw;
    }
}

//
// llama_kv_cache_mod_context
//

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_memory_status status) : status(status) {}

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_kv_cache_mod * kv) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), base(kv->base->init_full()), own(kv->own.size()) {
    for (size_t i = 0; i < own.size(); ++i) {
        own[i].ctx = std::make_unique<llama_kv_cache_context>(kv->own[i].kv.get());
    }
}

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_kv_cache_mod * kv, llama_context * lctx, bool optimize) :
    status(LLAMA_MEMORY_STATUS_NO_UPDATE), kv(kv) {
    kv->for_each([&](llama_kv_cache & c) {
        auto ctx = c.init_update(lctx, optimize);
        if (ctx->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
            updates.push_back(std::move(ctx));
            status = LLAMA_MEMORY_STATUS_SUCCESS;
        }
    });
}

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_kv_cache_mod * kv, llama_memory_context_ptr base, uint32_t n_tokens) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), base(std::move(base)), own(kv->own.size()), n_tokens(n_tokens) {
    n_done = this->base->get_ubatch().n_tokens;
}

bool llama_kv_cache_mod_context::next() {
    for (auto & l : own) {
        l = {};
    }
    if (!base->next()) {
        return false;
    }
    n_done += base->get_ubatch().n_tokens;
    return true;
}

bool llama_kv_cache_mod_context::apply() {
    if (updates.empty()) {
        return base->apply();
    }

    bool res = true;
    for (auto & ctx : updates) {
        res = ctx->apply() && res;
    }
    // a shift writes to all cells, also to those never used
    kv->trim();

    return res;
}

llama_memory_status llama_kv_cache_mod_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_mod_context::get_ubatch() const {
    return base->get_ubatch();
}

const llama_kv_cache_context * llama_kv_cache_mod_context::get_layer(int32_t il) const {
    const int32_t i = kv->map_own.at(il);
    return i < 0 ? static_cast<const llama_kv_cache_context *>(base.get()) : own[i].ctx.get();
}

bool llama_kv_cache_mod_context::place(int32_t il, const llama_ubatch & ubatch) {
    const int32_t i = kv->map_own.at(il);
    if (i < 0) {
        return true;
    }

    own[i].sinfo = kv->place(il, ubatch);
    if (own[i].sinfo.empty()) {
        return false;
    }

    own[i].ctx = std::make_unique<llama_kv_cache_context>(kv->own[i].kv.get(),
            llama_kv_cache::slot_info_vec_t { own[i].sinfo }, std::vector<llama_ubatch> { ubatch });

    return own[i].ctx->apply();
}

void llama_kv_cache_mod_context::set_dropped(int32_t il, const std::vector<uint8_t> & dropped) {
    kv->set_dropped(il, own[kv->map_own.at(il)].sinfo, dropped);
}

void llama_kv_cache_mod_context::hide_dropped(ggml_tensor * mask, const llama_ubatch * ubatch, int32_t il) const {
    kv->hide_dropped(mask, ubatch, il);
}
