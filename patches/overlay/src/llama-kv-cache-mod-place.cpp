#include "llama-kv-cache-mod.h"

#include "llama-batch.h"
#include "llama-impl.h"

#include <algorithm>
#include <array>
#include <cstring>

// cells that a graph has room for beyond those in use, where it takes them all
static constexpr uint32_t MOD_N_ROOM = 256;

//
// placing tokens in cells
//

llama_pos llama_kv_cache_mod::reach(llama_seq_id seq_id, size_t window) const {
    // the first query that may come, with the rollback
    const llama_pos p = base->seq_pos_max(seq_id) + 1 - (llama_pos) rollback;
    return p < 0 ? 0 : windows[window].first(p);
}

bool llama_kv_cache_mod::is_passing(const llama_ubatch & ubatch, uint32_t i, size_t window) const {
    for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
        if (ubatch.pos[i] >= reach(ubatch.seq_id[i][s], window)) {
            return false;
        }
    }
    return true;
}

llama_kv_cache::slot_info llama_kv_cache_mod::place(layer_group & c, const llama_ubatch & ubatch, const std::vector<uint8_t> & dropped) {
    const auto & cells = c.kv->get_cells(0);

    // what is freed together lies together, to leave whole pages: kept; dropped, but within reach; passing.
    // where all leave the window they do so in their order
    std::array<std::vector<uint32_t>, 3> parts;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const bool drop = !dropped.empty() && dropped[i];
        parts[!drop ? 0 : is_passing(ubatch, i, c.window) ? 2 : 1].push_back(i);
    }

    llama_kv_cache::slot_info sinfo = { 0, 0, { 0 }, { std::vector<uint32_t>(ubatch.n_tokens) } };
    auto & idxs = sinfo.idxs[0];

    // the first free cells: the range in use stays compact, and with it the time of attention
    uint32_t head = c.head;
    uint32_t next = c.head;
    for (const auto & part : parts) {
        if (&part == &parts[2]) {
            // behind all others, if there is room
            head = next;
            const uint32_t n_used = std::max(next, cells.used_max_p1());
            next = n_used + part.size() <= cells.size() ? n_used : next;
        }
        for (const uint32_t i : part) {
            while (next < cells.size() && !cells.is_empty(next)) {
                ++next;
            }
            if (next == cells.size()) {
                return {};
            }
            idxs[i] = next++;
        }
    }

    if (!c.rows->reserve(std::max(next, cells.used_max_p1()))) {
        LLAMA_LOG_WARN("%s: layer %d: out of memory for the K/V of %u tokens\n", __func__, c.il, ubatch.n_tokens);
        return {};
    }

    c.head = head;
    c.passing.clear();
    for (const uint32_t i : parts[2]) {
        c.passing.push_back(idxs[i]);
    }
    for (const uint32_t idx : idxs) {
        c.mask.touch(idx);
    }

    return sinfo;
}

void llama_kv_cache_mod::settle(layer_group & c) {
    if (c.passing.empty()) {
        return;
    }

    auto & cells = c.kv->v_cells[0];
    for (const uint32_t idx : c.passing) {
        for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
            if (cells.seq_has(idx, s)) {
                auto & freed = seqs[s].left[c.window].freed;
                freed = std::max(freed, cells.pos_get(idx));
            }
        }
        cells.rm(idx);
        c.emptied(idx);
    }
    c.passing.clear();

    // at once, so that no two layers hold such memory at a time
    c.rows->trim_tail();
}

void llama_kv_cache_mod::set_dropped(layer_group & c, const llama_kv_cache::slot_info & sinfo, const std::vector<uint8_t> & dropped) {
    GGML_ASSERT(sinfo.idxs[0].size() >= dropped.size());
    for (size_t i = 0; i < dropped.size(); ++i) {
        c.kv->v_cells[0].set_dropped(sinfo.idxs[0][i], dropped[i]);
        c.mask.touch(sinfo.idxs[0][i]);
    }
}

void llama_kv_cache_mod::take_back(layer_group & c, const llama_kv_cache::slot_info & sinfo, uint32_t i) {
    for (; i < sinfo.idxs[0].size(); ++i) {
        const uint32_t idx = sinfo.idxs[0][i];

        c.kv->v_cells[0].rm(idx);
        c.emptied(idx);
    }
}

int32_t llama_kv_cache_mod::reserve(layer_group & c) {
    const auto & cells = c.kv->get_cells(0);
    while (c.head < cells.size() && !cells.is_empty(c.head)) {
        ++c.head;
    }
    const uint32_t n_room = slack_used == slack::room ? MOD_N_ROOM : 0;

    const bool ok = c.head < cells.size() && c.rows->reserve(std::max(c.head + 1, cells.used_max_p1()) + n_room);

    return ok ? (int32_t) c.head : -1;
}

void llama_kv_cache_mod::occupy(layer_group & c, int32_t cell, const llama_ubatch & ubatch, bool dropped) {
    auto & cells = c.kv->v_cells[0];

    cells.pos_set(cell, ubatch.pos[0]);
    if (ubatch.token) {
        llama_kv_cell_ext ext;
        ext.tok = ubatch.token[0];
        cells.ext_set(cell, ext);
    }
    for (int32_t s = 0; s < ubatch.n_seq_id[0]; ++s) {
        cells.seq_add(cell, ubatch.seq_id[0][s]);
    }

    cells.set_dropped(cell, dropped);
    c.head = cell + 1;
    c.mask.touch(cell);
}

bool llama_kv_cache_mod::has_f32() const {
    return type_k == GGML_TYPE_F32 || type_v == GGML_TYPE_F32;
}

void llama_kv_cache_mod::set_slack(slack value) {
    slack_used = value;
}

const llama_kv_cache_context * llama_kv_cache_mod::get_one(layer_group & c, int32_t cell) {
    if (!c.one) {
        c.one = std::make_unique<llama_kv_cache_context>(c.kv);
    }
    // as llama_kv_cache::get_n_kv(), with the reserved cell and the slack
    const uint32_t n_pad  = std::max(c.kv->n_pad, 256u);
    const uint32_t n_used = get_n_used(c.il, c.part, cell);

    uint32_t n = n_used;
    switch (slack_used) {
        case slack::none:                        break;
        case slack::fit:  n += n_used/4 + n_pad; break;
        case slack::room: n += MOD_N_ROOM;       break;
    }
    c.one->n_kv = std::min(c.kv->get_size(), GGML_PAD(n, n_pad));

    return c.one.get();
}

void llama_kv_cache_mod::fill_mask(ggml_tensor * mask, const llama_ubatch & ubatch, int32_t il, int32_t part, int32_t cell) {
    if (auto * c = find(il, part)) {
        c->mask.fill(mask, ubatch, c->kv->get_cells(0), c->drops ? windows[c->window] : llama_mod_window(), hparams.use_alibi);
        if (cell >= 0) {
            // 0 in either type, the distance too
            memset((char *) mask->data + cell*ggml_element_size(mask), 0, ggml_element_size(mask));
        }
    } else {
        base_mask.fill(mask, ubatch, base->get_cells(0), {}, hparams.use_alibi);
    }
}

uint32_t llama_kv_cache_mod::get_n_used(int32_t il, int32_t part, int32_t cell) const {
    const auto * c = find(il, part);
    return std::max((c ? *c->kv : *base).get_cells(0).used_max_p1(), uint32_t(cell + 1));
}
