#include "llama-kv-cache-mod.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-mod-arch.h"
#include "llama-mod-context.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>

static constexpr llama_pos POS_MAX = std::numeric_limits<llama_pos>::max();

// memory is given back to the system when more than this many tokens are removed at once
static constexpr uint32_t MOD_N_TRIM = 64;

//
// llama_kv_cache_mod
//

static llama_hparams mod_one_head(llama_hparams hparams) {
    std::fill(hparams.n_head_kv_arr.begin(), hparams.n_head_kv_arr.end(), 1);
    return hparams;
}

llama_kv_cache_mod::llama_kv_cache_mod(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) :
    mod(*model.mod), hparams(model.hparams), hparams_part(mod_one_head(model.hparams)), n_seq_max(cparams.n_seq_max),
    n_ubatch(cparams.n_ubatch), swa_full(params.swa_full), type_k(params.type_k), type_v(params.type_v),
    v_trans(!cparams.flash_attn && !model.hparams.is_mla()) {

    init_windows();
    init_groups(model);

    seqs.assign(LLAMA_MAX_SEQ, no_tokens());

    for (int32_t il = 0; il < (int32_t) hparams.n_layer() && !recr; ++il) {
        if (llama_mod_arch_has_state(model, il)) {
            recr = std::make_unique<llama_mod_recurrent>(model, cparams);
        }
    }

    const bool     offload = cparams.offload_kqv;
    const uint32_t kv_size = cparams.n_ctx_seq;

    const auto reuse = [this](int32_t il) {
        const int32_t source = il < (int32_t) hparams.n_layer() ? llama_mod_arch_kv_source(hparams, il) : il;
        return source == il ? -1 : source;
    };
    const auto make = [this, reuse, offload, kv_size, &model](llama_mod_kv_mode mode, const llama_hparams & hparams, const llama_kv_cache::layer_filter_cb & filter) {
        return std::make_unique<llama_mod_rows>(mode, kv_size, [=, &model, &hparams](uint32_t n_rows) {
            return std::make_unique<llama_kv_cache>(model, hparams, type_k, type_v, v_trans, offload, /*unified =*/ true,
                    n_rows, n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE, nullptr,
                    filter, reuse, nullptr);
        });
    };

    auto [mode, reason] = llama_mod_rows::choose_mode(model, v_trans, offload);
    try {
        init_caches(mode, llama_mod_rows::choose_part_mode(mode, model, offload), make);
    } catch (const std::exception &) {
        if (mode != LLAMA_MOD_KV_LAZY) {
            throw;
        }
        mode   = LLAMA_MOD_KV_GROW;
        reason = "no address space for the whole context";
        init_caches(mode, mode, make);
    }

    LLAMA_LOG_INFO("%s: K/V memory: %s (%s)\n", __func__, llama_mod_rows::mode_name(mode), reason);
}

void llama_kv_cache_mod::init_windows() {
    windows.resize(WINDOW_LAYER + 1);

    // one for all such layers: hparams has no other
    for (int32_t il = 0; il < (int32_t) hparams.n_layer(); ++il) {
        if (const auto window = llama_mod_arch_window(hparams, il); window.size > 0) {
            windows[WINDOW_LAYER] = window;
        }
    }

    std::set<int32_t> sizes;
    for (const auto & u : mod.units) {
        if (u.kind == LLAMA_MOD_KIND_KV) {
            sizes.insert(u.window);
        }
    }
    for (const int32_t size : sizes) {
        windows.push_back({ size, llama_mod_window::sliding });
    }
}

void llama_kv_cache_mod::init_groups(const llama_model & model) {
    const int32_t n_layer = hparams.n_layer();

    map_group.assign(n_layer, GROUP_BASE);

    int32_t i_window = -1; // of the layers with a window
    for (int32_t il = 0; il < n_layer; ++il) {
        const bool    routed = mod.has_cells(il);
        const bool    window = llama_mod_arch_window(hparams, il).size > 0;
        const int32_t source = llama_mod_arch_kv_source(hparams, il);

        // loading has refused these (llama_mod_arch_refuses)
        GGML_ASSERT(!routed || (!window && source == il));

        if (!llama_mod_arch_has_attn(model, il)) {
            map_group[il] = GROUP_NONE;
        } else if (source != il) {
            map_group[il] = map_group[source];
        } else if (window && i_window >= 0) {
            map_group[il] = i_window;
        } else if (routed || window) {
            map_group[il] = groups.size();
            if (window) {
                i_window = groups.size();
            }
            for (int32_t part = 0; part < mod.n_parts(il); ++part) {
                const int32_t u = mod.find_kv(il, part);

                auto & c = groups.emplace_back();
                c.il     = il;
                c.part   = part;
                c.routed = routed;
                c.drops  = window || u >= 0;
                c.window = WINDOW_LAYER;
                while (u >= 0 && (c.window == WINDOW_LAYER || windows[c.window].size != mod.units[u].window)) {
                    ++c.window;
                }
            }
        }
    }
}

void llama_kv_cache_mod::init_caches(llama_mod_kv_mode mode, llama_mod_kv_mode mode_part, const make_rows_t & make) {
    const auto has_group = [this](int32_t i, int32_t part) {
        return [this, i, part](int32_t il) { return il < (int32_t) map_group.size() && (i < 0 ? map_group[il] == i : get_group(il, part) == i); };
    };

    // what a failed attempt has reserved
    base_rows.reset();
    for (auto & c : groups) {
        c.rows.reset();
    }

    base_rows = make(mode, hparams, has_group(GROUP_BASE, 0));
    base      = base_rows->kv.get();
    base->v_cells[0].keep_tokens(true); // a checkpoint goes with them

    for (size_t i = 0; i < groups.size(); ++i) {
        auto & c = groups[i];
        c.rows = mod.n_parts(c.il) > 1 ?
            make(mode_part, hparams_part, has_group(i, c.part)) :
            make(mode,      hparams,      has_group(i, 0));
        c.kv   = c.rows->kv.get();
    }
}

void llama_kv_cache_mod::layer_group::emptied(uint32_t idx) {
    head = std::min(head, idx);
    mask.touch(idx);
}

llama_kv_cache_mod::seq_info llama_kv_cache_mod::no_tokens() const {
    seq_info res;
    res.left.resize(windows.size());

    return res;
}

llama_kv_cache_mod::layer_group * llama_kv_cache_mod::find(int32_t il, int32_t part) {
    const int32_t i = get_group(il, part);
    return i < 0 ? nullptr : &groups[i];
}

const llama_kv_cache_mod::layer_group * llama_kv_cache_mod::find(int32_t il, int32_t part) const {
    const int32_t i = get_group(il, part);
    return i < 0 ? nullptr : &groups[i];
}

int32_t llama_kv_cache_mod::get_group(int32_t il, int32_t part) const {
    const int32_t i = map_group.at(il);
    return i < 0 ? GROUP_BASE : i + part;
}

llama_kv_cache * llama_kv_cache_mod::get_own(int32_t il, int32_t part) const {
    const auto * c = find(il, part);
    return c ? c->kv : nullptr;
}

llama_memory_context_ptr llama_kv_cache_mod::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    const auto fail = [] {
        return std::make_unique<llama_kv_cache_mod_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    const llama_batch & batch = balloc.get_batch();
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            if (seqs[batch.seq_id[i][s]].broken) {
                LLAMA_LOG_ERROR("%s: sequence %d lacks K/V or states that the next token would need: remove it and process its tokens again\n",
                        __func__, batch.seq_id[i][s]);
                return std::make_unique<llama_kv_cache_mod_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
            }
        }
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        seqs[s].before        = base->seq_pos_max(s);
        seqs[s].origin_before = seqs[s].origin;
        for (auto & left : seqs[s].left) {
            left.freed_before = left.freed;
            left.expired_new  = seqs[s].before;
        }
    }

    // the base takes the first free cells
    const auto & cells = base->get_cells(0);
    if (!base_rows->reserve(std::max(cells.used_max_p1(), cells.get_used() + balloc.get_n_tokens()))) {
        LLAMA_LOG_WARN("%s: out of memory for the K/V of %u tokens\n", __func__, balloc.get_n_tokens());
        return fail();
    }

    llama_memory_context_ptr ctx;
    if (recr) {
        auto ubatches = recr->split(balloc, n_ubatch, embd_all);
        if (ubatches.empty()) {
            return fail();
        }
        if (auto sinfos = base->prepare(ubatches); !sinfos.empty()) {
            ctx = std::make_unique<llama_kv_cache_context>(base, std::move(sinfos), std::move(ubatches));
        }
    } else {
        ctx = base->init_batch(balloc, n_ubatch, embd_all);
    }
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
    // a shift takes quantised K for rotated (llama_kv_cache::build_rope_shift); K that V is a part of never is
    const auto is_rotated = [this](const llama_kv_cache & kv) {
        return kv.layers.empty() || (kv.attn_rot_k && !hparams.is_mla());
    };
    bool res = base->get_can_shift();
    if (ggml_is_quantized(type_k)) {
        res = res && is_rotated(*base) && std::all_of(groups.begin(), groups.end(), [&](const auto & c) { return is_rotated(*c.kv); });
    }
    // it would move tokens from one chunk to another
    return res && windows[WINDOW_LAYER].kind != llama_mod_window::chunked;
}

void llama_kv_cache_mod::touch_masks() {
    base_mask.touch_all();
    for (auto & c : groups) {
        c.mask.touch_all();
    }
}

void llama_kv_cache_mod::clear(bool data) {
    touch_masks();
    for_each([&](llama_kv_cache & kv) { kv.clear(data); });
    if (recr) {
        recr->clear(data);
    }

    for (auto & c : groups) {
        c.head = 0;
    }
    std::fill(seqs.begin(), seqs.end(), no_tokens());

    trim();
}

llama_pos llama_kv_cache_mod::last_before(llama_seq_id seq_id, llama_pos p0) const {
    const auto & sp = base->get_cells(seq_id).seq_pos_get(seq_id);
    const auto   it = sp.lower_bound({ p0, 0 });
    return it == sp.begin() ? -1 : std::prev(it)->first;
}

bool llama_kv_cache_mod::can_end_at(llama_seq_id seq_id, llama_pos p0) const {
    // there may be a gap before p0
    const llama_pos p = last_before(seq_id, p0) + 1;
    for (size_t w = 0; w < windows.size(); ++w) {
        const llama_pos freed = seqs[seq_id].left[w].freed;
        if (freed >= 0 && freed >= windows[w].first(p)) {
            return false;
        }
    }
    return !recr || p > recr->first_end(seq_id, base->seq_pos_max(seq_id));
}

void llama_kv_cache_mod::move_states() {
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max && recr; ++s) {
        const llama_pos p_max = base->seq_pos_max(s);
        if (p_max < 0) {
            recr->remove(s); // all of it went below 0
        } else {
            recr->move(s, p_max);
        }
    }
}

void llama_kv_cache_mod::seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    base_mask.touch_all();
    base->seq_rm(seq_id, p0, p1);
    for (auto & c : groups) {
        free_cells(c, seq_id, p0, p1, false);
    }

    auto & s = seqs[seq_id];
    const llama_pos p_max = base->seq_pos_max(seq_id);
    if (p_max < 0) {
        s = no_tokens();
    }
    s.history.cut(p_max + 1);
    for (auto & left : s.left) {
        left.expired = std::min(left.expired, p_max);
    }
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

    const uint32_t n_used = base->get_cells(0).get_used();

    for (llama_seq_id s = s0; s < s1; ++s) {
        const llama_pos p_max = base->seq_pos_max(s);
        if (p_max < p0) {
            if (p_max < 0) {
                seqs[s] = no_tokens();
            }
            continue;
        }
        seq_rm_one(s, p0, p1);
        if (recr && base->seq_pos_max(s) < 0) {
            recr->remove(s);
        } else if (recr && p_max < p1) {
            recr->end(s, base->seq_pos_max(s));
        }
        if (p_max < p1) {
            // can_end_at() held
            seqs[s].broken = false;
        }
    }

    // not for the token or two that a sampler takes back
    if (n_used - base->get_cells(0).get_used() > MOD_N_TRIM) {
        trim();
    }

    return true;
}

void llama_kv_cache_mod::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const auto & sp    = base->get_cells(0).seq_pos_get(seq_id_src);
    const auto   first = sp.lower_bound({ std::max(p0, 0), 0 });
    if (first == sp.end() || (p1 >= 0 && first->first >= p1)) {
        return; // there is nothing to copy
    }

    touch_masks();

    const auto & src = seqs[seq_id_src];
    auto       & dst = seqs[seq_id_dst];

    const bool had = base->seq_pos_max(seq_id_dst) >= 0;
    if (!had) {
        dst.origin.reset();
    }
    add_origin(seq_id_dst, src.origin);

    for_each([&](llama_kv_cache & kv) { kv.seq_cp(seq_id_src, seq_id_dst, p0, p1); });

    const llama_pos p_max = base->seq_pos_max(seq_id_dst);

    // the state is that of all tokens
    if (recr && !had && base->seq_pos_min(seq_id_dst) == base->seq_pos_min(seq_id_src) && p_max == base->seq_pos_max(seq_id_src)) {
        recr->copy(seq_id_src, seq_id_dst);
    } else if (recr) {
        recr->remove(seq_id_dst);
    }

    if (!had && base->seq_pos_min(seq_id_dst) == base->seq_pos_min(seq_id_src)) {
        dst.history = src.history;
        dst.history.cut(p_max + 1);
    } else {
        llama_mod_digest what;
        what.add(src.history.digest(POS_MAX));
        what.add(std::max(p0, 0));
        what.add(p1);
        dst.history.add(std::max(p0, 0), what.value);
    }

    for (size_t w = 0; w < windows.size(); ++w) {
        const auto & from = src.left[w];
        auto       & to   = dst.left[w];
        to.freed   = std::max(to.freed, from.freed);
        to.expired = std::min(had ? std::min(to.expired, from.expired) : from.expired, p_max);
    }
    dst.broken = dst.broken || src.broken;

    const bool shorter = p_max < base->seq_pos_max(seq_id_src);
    if ((shorter && !can_end_at(seq_id_dst, p_max + 1)) || (recr && !recr->has_state(seq_id_dst))) {
        LLAMA_LOG_ERROR("%s: sequence %d cannot be continued from position %d: K/V or states that the next token would need are gone\n",
                __func__, seq_id_dst, p_max + 1);
        dst.broken = true;
    }
}

void llama_kv_cache_mod::seq_keep(llama_seq_id seq_id) {
    touch_masks();
    for_each([&](llama_kv_cache & kv) { kv.seq_keep(seq_id); });
    if (recr) {
        recr->keep(seq_id);
    }

    for (auto & c : groups) {
        c.head = 0;
    }
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (s != seq_id) {
            seqs[s] = no_tokens();
        }
    }

    trim();
}

std::vector<std::set<uint32_t>> llama_kv_cache_mod::shared_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    std::vector<std::set<uint32_t>> res(groups.size());

    const auto & cells = base->get_cells(0);

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (s == seq_id) {
            continue;
        }
        std::set<llama_pos> pos; // of the tokens that both have
        const auto & sp = cells.seq_pos_get(s);
        for (auto p = sp.lower_bound({ p0, 0 }); p != sp.end() && p->first < p1; ++p) {
            if (cells.seq_has(p->second, seq_id)) {
                pos.insert(p->first);
            }
        }
        for (size_t i = 0; i < groups.size() && !pos.empty(); ++i) {
            const auto & cells_own = groups[i].kv->get_cells(0);
            for (const auto & [p, idx] : cells_own.seq_pos_get(s)) {
                if (pos.count(p) > 0 && !cells_own.seq_has(idx, seq_id)) {
                    res[i].insert(idx);
                }
            }
        }
    }

    return res;
}

void llama_kv_cache_mod::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_ASSERT(seq_id >= 0 && seq_id < (llama_seq_id) seqs.size());

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? POS_MAX : p1;
    if (p0 >= p1 || shift == 0) {
        return;
    }

    // what was removed between it and the range is gone for good
    const llama_pos below = last_before(seq_id, p0);

    const auto moved = shared_cells(seq_id, p0, p1);
    add_history(seq_id, p0, p1, std::min(p0, p0 + shift), shift);

    for_each([&](llama_kv_cache & kv) { kv.seq_add(seq_id, p0, p1, shift); });

    for (size_t i = 0; i < groups.size(); ++i) {
        for (const uint32_t idx : moved[i]) {
            groups[i].kv->v_cells[0].pos_add(idx, shift);
        }
    }
    touch_masks();
    move_states();

    for (auto & c : groups) {
        c.head = 0;
    }

    // cells may be shared: they move for all their sequences
    for (llama_seq_id i = 0; i < (llama_seq_id) seqs.size(); ++i) {
        auto & s = seqs[i];
        if (base->seq_pos_max(i) < 0) {
            s = no_tokens(); // all of it went below 0
            continue;
        }
        for (auto & left : s.left) {
            left.expired = std::max(-1, left.expired + std::min(shift, 0));
            if (i == seq_id && left.freed >= p0 && left.freed < p1) {
                left.freed = std::max(left.freed + shift, below);
            } else if (left.freed >= p0 && shift > 0) {
                left.freed = std::max(left.freed, std::min(left.freed, p1 - 1) + shift);
            }
        }
    }
}

void llama_kv_cache_mod::add_history(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos from, int32_t by) {
    llama_mod_digest what;
    what.add(p0);
    what.add(p1);
    what.add(by);

    const auto & cells = base->get_cells(0);
    const auto   sp    = cells.seq_pos_get(seq_id);
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (base->seq_pos_max(s) < 0) {
            continue;
        }
        // cells may be shared: they move for all their sequences
        for (auto p = sp.lower_bound({ p0, 0 }); p != sp.end() && p->first < p1; ++p) {
            if (cells.seq_has(p->second, s)) {
                seqs[s].history.add(from, what.value);
                if (recr) {
                    recr->fix(s);
                }
                break;
            }
        }
    }
}

void llama_kv_cache_mod::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    touch_masks();
    add_history(seq_id, std::max(p0, 0), p1 < 0 ? POS_MAX : p1, std::max(p0, 0)/std::max(d, 1), d);
    for_each([&](llama_kv_cache & kv) { kv.seq_div(seq_id, p0, p1, d); });
    move_states();

    // what was freed stays the upper bound that it was; cells may be shared
    for (auto & s : seqs) {
        for (auto & left : s.left) {
            left.expired = -1;
        }
    }
}

llama_pos llama_kv_cache_mod::seq_pos_min(llama_seq_id seq_id) const {
    return base->seq_pos_min(seq_id);
}

llama_pos llama_kv_cache_mod::seq_pos_max(llama_seq_id seq_id) const {
    return base->seq_pos_max(seq_id);
}

llama_pos llama_kv_cache_mod::seq_pos_fixed(llama_seq_id seq_id) const {
    llama_pos res = seq_pos_min(seq_id);
    for (size_t w = 0; w < windows.size(); ++w) {
        if (const llama_pos freed = seqs[seq_id].left[w].freed; freed >= 0 && res >= 0) {
            res = std::max(res, windows[w].last(freed));
        }
    }
    // the states before the last one are for drafts: no state that is saved has them, which the server relies on
    return recr ? seq_pos_max(seq_id) : res;
}

bool llama_kv_cache_mod::has_shift() const {
    return base->get_has_shift() || std::any_of(groups.begin(), groups.end(), [](const auto & c) { return c.kv->get_has_shift(); });
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_mod::memory_breakdown() const {
    auto res = base->memory_breakdown();
    for (const auto & c : groups) {
        for (const auto & [buft, size] : c.kv->memory_breakdown()) {
            res[buft] += size;
        }
    }
    if (recr) {
        for (const auto & [buft, size] : recr->memory_breakdown()) {
            res[buft] += size;
        }
    }
    return res;
}

//
// freeing cells
//

llama_pos llama_kv_cache_mod::free_cells(layer_group & c, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool only_dropped) {
    auto & cells = c.kv->v_cells[0];

    std::vector<uint32_t> idxs;
    llama_pos last = -1;

    // by position: a scan of all cells of all layers would cost more than a decode
    const auto & sp = cells.seq_pos_get(seq_id);
    for (auto p = sp.lower_bound({ p0, 0 }); p != sp.end() && p->first < p1; ++p) {
        if (!only_dropped || cells.is_dropped(p->second)) {
            idxs.push_back(p->second);
            last = p->first;
        }
    }

    for (const uint32_t idx : idxs) {
        if (cells.seq_rm(idx, seq_id)) {
            c.emptied(idx);
        } else {
            c.mask.touch(idx);
        }
    }

    return last;
}

void llama_kv_cache_mod::expire(bool all) {
    if (recr && all) {
        recr->keep();
    }

    std::vector<uint32_t> n_used;
    for (const auto & c : groups) {
        n_used.push_back(c.kv->get_cells(0).get_used());
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        auto & info = seqs[s];

        const llama_pos p_max = base->seq_pos_max(s);
        if (p_max <= info.before) {
            continue;
        }

        for (size_t w = 0; w < windows.size(); ++w) {
            auto & left = info.left[w];

            auto & expired = all ? left.expired : left.expired_new;

            const llama_pos p0 = expired + 1;
            const llama_pos p1 = reach(s, w);
            if (p0 >= p1) {
                continue;
            }

            for (auto & c : groups) {
                if (c.drops && c.window == w) {
                    left.freed = std::max(left.freed, free_cells(c, s, p0, p1, true));
                }
            }
            expired = p1 - 1;
        }
    }

    for (size_t i = 0; i < groups.size(); ++i) {
        if (n_used[i] > groups[i].kv->get_cells(0).get_used() + MOD_N_TRIM) {
            groups[i].rows->trim();
        }
    }
}

void llama_kv_cache_mod::undo() {
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        const auto info = seqs[s];
        if (base->seq_pos_max(s) > info.before) {
            seq_rm_one(s, info.before + 1, POS_MAX);
            // a failed decode has freed none but its own cells
            for (size_t w = 0; w < windows.size(); ++w) {
                seqs[s].left[w].freed = info.left[w].freed_before;
            }
        }
        seqs[s].origin = info.origin_before;
    }
    if (recr) {
        recr->undo();
    }

    for (auto & c : groups) {
        c.passing.clear();
    }
    trim();
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
    base_rows->trim();
    base_rows->shrink();
    for (auto & c : groups) {
        c.rows->trim();
        c.rows->shrink();
    }
}

void llama_kv_cache_mod::compact(llama_context * lctx) {
    bool sparse = base_rows->is_sparse();
    for (const auto & c : groups) {
        sparse = sparse || c.rows->is_sparse();
    }
    if (!sparse) {
        return;
    }

    llama_synchronize(lctx);

    base_rows->compact();
    for (auto & c : groups) {
        c.rows->compact();
        c.head = 0;
    }
    n_compact++;
    touch_masks();
}

void llama_kv_cache_mod::set_synchronize(const std::function<void()> & f) {
    base_rows->synchronize = f;
    for (auto & c : groups) {
        c.rows->synchronize = f;
    }
    if (recr) {
        recr->synchronize = f;
    }
}

void llama_kv_cache_mod::set_origin(const std::function<llama_mod_origin()> & f) {
    make_origin = f;
}

std::shared_ptr<const llama_mod_origin> llama_kv_cache_mod::get_origin() {
    auto now = make_origin();
    now.type_k  = type_k;
    now.type_v  = type_v;
    now.v_trans = v_trans;
    if (!origin || !origin->difference(now).empty()) {
        origin = std::make_shared<const llama_mod_origin>(std::move(now));
    }
    return origin;
}

void llama_kv_cache_mod::add_origin(llama_seq_id seq_id, const std::shared_ptr<const llama_mod_origin> & added) {
    auto & old = seqs[seq_id].origin;
    if (!old || old == added) {
        old = added;
    } else if (!old->mixed && !old->difference(*added).empty()) {
        auto mixed = *added;
        mixed.mixed = true;
        old = std::make_shared<const llama_mod_origin>(std::move(mixed));
    }
}

uint64_t llama_kv_cache_mod::get_generation() const {
    uint64_t res = n_compact + base_rows->get_n_grown();
    for (const auto & c : groups) {
        res += c.rows->get_n_grown();
    }
    return res;
}

void llama_kv_cache_mod::kv_stats(int32_t il, llama_mod_kv_stats & stats) const {
    stats = {};
    base_rows->add_stats(il, stats);
    for (const auto & c : groups) {
        c.rows->add_stats(il, stats);
    }
}

void llama_kv_cache_mod::kv_seq_stats(llama_seq_id seq_id, llama_mod_kv_seq_stats & stats) const {
    const uint64_t n = base->get_cells(0).seq_pos_get(seq_id).size();

    stats = { n, n*base_rows->bytes_per_cell(), n*base_rows->bytes_per_cell() };
    for (const auto & c : groups) {
        // as upstream sizes the cache of such layers, see llama_kv_cache_iswa
        const auto & window = windows[WINDOW_LAYER];
        const uint64_t n_dense = c.routed || swa_full ? n : std::min<uint64_t>(n, GGML_PAD(window.size + n_ubatch, 256));

        stats.bytes_used  += c.kv->get_cells(0).seq_pos_get(seq_id).size()*c.rows->bytes_per_cell();
        stats.bytes_dense += n_dense*c.rows->bytes_per_cell();
    }
}

//
// llama_kv_cache_mod_context
//

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_memory_status status) : status(status) {}

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_kv_cache_mod * kv) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), is_full_cache(true), base(kv->base->init_full()), groups(kv->groups.size()) {
    for (size_t i = 0; i < groups.size(); ++i) {
        groups[i].ctx = std::make_unique<llama_kv_cache_context>(kv->groups[i].kv);
    }
}

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_kv_cache_mod * kv, llama_context * lctx, bool optimize) :
    status(LLAMA_MEMORY_STATUS_NO_UPDATE), kv(kv), lctx(lctx) {
    kv->for_each([&](llama_kv_cache & c) {
        if (c.get_cells(0).get_used() == 0 || c.layers.empty()) {
            c.v_cells[0].reset_shift(); // a graph on nothing cannot be built
        }
        auto ctx = c.init_update(lctx, optimize);
        if (ctx->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
            updates.push_back(std::move(ctx));
            status = LLAMA_MEMORY_STATUS_SUCCESS;
        }
    });

    if (updates.empty()) {
        kv->compact(lctx);
    }
}

llama_kv_cache_mod_context::llama_kv_cache_mod_context(llama_kv_cache_mod * kv, llama_memory_context_ptr base, uint32_t n_tokens) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), base(std::move(base)), groups(kv->groups.size()), n_tokens(n_tokens) {
    n_done = this->base->get_ubatch().n_tokens;
}

bool llama_kv_cache_mod_context::next() {
    for (auto & l : groups) {
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
        // rows of a mask follow tokens that come in order by themselves
        const auto & ubatch = base->get_ubatch();
        const auto   origin = kv->get_origin();
        for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
            kv->add_origin(ubatch.seq_id_unq[s], origin);
        }
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.pos[i] <= kv->base->seq_pos_max(ubatch.seq_id[i][0])) {
                kv->base_mask.touch_all();
                break;
            }
        }
        if (kv->recr) {
            kv->recr->place(ubatch);
        }
        return base->apply() && place_all();
    }
    kv->touch_masks();

    // a shift that is stopped half-way can be neither finished nor taken back
    const bool res = lctx->get_mod()->run_whole([&] {
        bool ok = true;
        for (auto & ctx : updates) {
            ok = ctx->apply() && ok;
        }
        return ok;
    });
    // a shift has written to free cells too
    kv->trim();
    kv->compact(lctx);

    return res;
}

llama_memory_status llama_kv_cache_mod_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_mod_context::get_ubatch() const {
    return base->get_ubatch();
}

const llama_kv_cache_context * llama_kv_cache_mod_context::get_layer(int32_t il, int32_t part) const {
    const int32_t i = kv->get_group(il, part);
    if (i < 0) {
        return static_cast<const llama_kv_cache_context *>(base.get());
    }
    return groups[i].cell < 0 ? groups[i].ctx.get() : kv->get_one(kv->groups[i], groups[i].cell);
}

int32_t llama_kv_cache_mod_context::get_group(int32_t il, int32_t part) const {
    return kv->get_group(il, part);
}

bool llama_kv_cache_mod_context::place_one(size_t i, const llama_ubatch & ubatch, const std::vector<uint8_t> & dropped) {
    auto & c = kv->groups[i];
    auto & g = groups[i];

    g.cell  = -1;
    g.sinfo = kv->place(c, ubatch, dropped);
    if (g.sinfo.empty()) {
        return false;
    }

    g.ctx = std::make_unique<llama_kv_cache_context>(c.kv,
            llama_kv_cache::slot_info_vec_t { g.sinfo }, std::vector<llama_ubatch> { ubatch });

    g.ctx->apply();
    if (!c.routed) {
        kv->set_dropped(c, g.sinfo, std::vector<uint8_t>(ubatch.n_tokens, 1));
    } else if (!dropped.empty()) {
        kv->set_dropped(c, g.sinfo, dropped);
    }
    return true;
}

bool llama_kv_cache_mod_context::place_all() {
    for (size_t i = 0; i < groups.size(); ++i) {
        if (!kv->groups[i].routed && !place_one(i, base->get_ubatch(), {})) {
            return false;
        }
    }
    return true;
}

int32_t llama_kv_cache_mod_context::find_routed(int32_t il, int32_t part) const {
    const int32_t i = kv->get_group(il, part);
    return i >= 0 && kv->groups[i].routed ? i : -1;
}

bool llama_kv_cache_mod_context::place(int32_t il, int32_t part, const llama_ubatch & ubatch, const std::vector<uint8_t> & dropped) {
    const int32_t i = find_routed(il, part);
    return i < 0 || place_one(i, ubatch, dropped);
}

void llama_kv_cache_mod_context::settle(int32_t il, int32_t part) {
    if (const int32_t i = find_routed(il, part); i >= 0) {
        kv->settle(kv->groups[i]);
    }
}

void llama_kv_cache_mod_context::set_dropped(int32_t il, int32_t part, const std::vector<uint8_t> & dropped) {
    if (const int32_t i = find_routed(il, part); i >= 0) {
        kv->set_dropped(kv->groups[i], groups[i].sinfo, dropped);
    }
}

void llama_kv_cache_mod_context::take_back(int32_t il, int32_t part, uint32_t from) {
    if (const int32_t i = find_routed(il, part); i >= 0) {
        kv->take_back(kv->groups[i], groups[i].sinfo, from);
    }
}

bool llama_kv_cache_mod_context::reserve(int32_t il, int32_t part) {
    const int32_t i = find_routed(il, part);
    if (i < 0) {
        return true;
    }
    groups[i].cell = kv->reserve(kv->groups[i]);

    return groups[i].cell >= 0;
}

void llama_kv_cache_mod_context::occupy(int32_t il, int32_t part, bool dropped) {
    if (const int32_t i = find_routed(il, part); i >= 0) {
        kv->occupy(kv->groups[i], groups[i].cell, get_ubatch(), dropped);
    }
}

void llama_kv_cache_mod_context::fill_mask(ggml_tensor * mask, const llama_ubatch & ubatch, int32_t il, int32_t part) const {
    kv->fill_mask(mask, ubatch, il, part, get_cell(il, part));
}

int32_t llama_kv_cache_mod_context::get_cell(int32_t il, int32_t part) const {
    const int32_t i = kv->get_group(il, part);
    return i < 0 ? -1 : groups[i].cell;
}

uint32_t llama_kv_cache_mod_context::get_n_used(int32_t il, int32_t part) const {
    return kv->get_n_used(il, part, get_cell(il, part));
}
