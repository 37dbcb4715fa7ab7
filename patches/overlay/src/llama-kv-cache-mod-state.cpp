#include "llama-kv-cache-mod.h"

#include "llama-io.h"

#include <algorithm>
#include <stdexcept>

//
// state
//

void llama_kv_cache_mod::state_write_origins(llama_io_write_i & io, llama_seq_id seq_id, uint32_t magic) const {
    std::vector<const llama_mod_origin *> origins;
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if ((seq_id == -1 || s == seq_id) && seqs[s].origin && base->seq_pos_max(s) >= 0) {
            origins.push_back(seqs[s].origin.get());
        }
    }

    const uint32_t head[3] = { magic, MOD_STATE_VERSION, (uint32_t) origins.size() };
    io.write(head, sizeof(head));
    for (const auto * o : origins) {
        o->write(io);
    }
}

void llama_kv_cache_mod::state_read_origins(llama_io_read_i & io, uint32_t magic) {
    uint32_t head[3];
    io.read(head, sizeof(head));
    if (head[0] != magic || head[1] != MOD_STATE_VERSION) {
        throw std::runtime_error("mod: the state has another format: it is of another version of this library, of a dense model, or a checkpoint");
    }

    const auto now = get_origin();
    for (uint32_t i = 0; i < head[2]; ++i) {
        llama_mod_origin o;
        o.read(io);
        if (const auto why = o.difference(*now); !why.empty()) {
            throw std::runtime_error("mod: " + why);
        }
    }
}

void llama_kv_cache_mod::state_write_tokens(llama_io_write_i & io, llama_seq_id seq_id) const {
    const auto & cells = base->get_cells(0);

    std::vector<llama_token> tokens;
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i) && (seq_id == -1 || cells.seq_has(i, seq_id))) {
            tokens.push_back(cells.ext_get(i).tok);
        }
    }

    const uint32_t n = tokens.size();
    io.write(&n, sizeof(n));
    if (n > 0) {
        io.write(tokens.data(), n*sizeof(llama_token));
    }
}

void llama_kv_cache_mod::state_read_tokens(llama_io_read_i & io, const std::vector<uint32_t> & idxs) {
    uint32_t n;
    io.read(&n, sizeof(n));
    if (n != idxs.size()) {
        throw std::runtime_error("mod: the state's tokens do not match its cells");
    }

    auto & cells = base->v_cells[0];
    for (const uint32_t idx : idxs) {
        auto ext = cells.ext_get(idx);
        io.read(&ext.tok, sizeof(ext.tok));
        cells.ext_set(idx, ext);
    }
}

void llama_kv_cache_mod::state_write_info(llama_io_write_i & io, llama_seq_id seq_id) const {
    const auto & s = seqs[seq_id];

    const int32_t broken = s.broken;
    io.write(&broken, sizeof(broken));
    for (const auto & left : s.left) {
        io.write(&left.freed, sizeof(left.freed));
    }
    s.history.write(io);
}

void llama_kv_cache_mod::state_read_info(llama_io_read_i & io, llama_seq_id seq_id) {
    seq_info s = no_tokens();

    int32_t broken;
    io.read(&broken, sizeof(broken));
    s.broken = broken != 0;
    for (auto & left : s.left) {
        io.read(&left.freed, sizeof(left.freed));
        left.freed = std::max(-1, left.freed);
    }
    s.history.read(io);

    const bool has_tokens = base->seq_pos_max(seq_id) >= 0;
    if (has_tokens) {
        s.origin = get_origin();
    }
    seqs[seq_id] = has_tokens ? s : no_tokens();
}

void llama_kv_cache_mod::state_write_group(llama_io_write_i & io, const layer_group & c, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    const int32_t at[] = { c.il, c.part };
    io.write(at, sizeof(at));
    c.kv->state_write(io, seq_id, flags);

    // the decisions, cells in the order of llama_kv_cache::state_write()
    const auto & cells = c.kv->get_cells(0);

    std::vector<uint8_t> dropped;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && (seq_id == -1 || cells.seq_has(i, seq_id))) {
            dropped.push_back(cells.is_dropped(i));
        }
    }

    const uint32_t n = dropped.size();
    io.write(&n, sizeof(n));
    if (n > 0) {
        io.write(dropped.data(), n);
    }
}

void llama_kv_cache_mod::state_read_group(llama_io_read_i & io, layer_group & c, llama_seq_id seq_id, llama_state_seq_flags flags) {
    int32_t at[2];
    io.read(at, sizeof(at));
    if (at[0] != c.il || at[1] != c.part) {
        throw std::runtime_error("mod: the state belongs to a model with other routed layers");
    }

    llama_kv_cache::slot_info_vec_t sinfos;
    c.kv->state_read_sinfo(io, seq_id, flags, &sinfos, nullptr);

    uint32_t n;
    io.read(&n, sizeof(n));

    const std::vector<uint32_t> idxs = sinfos[0].empty() ? std::vector<uint32_t>() : sinfos[0].idxs[0];
    if (n != idxs.size()) {
        throw std::runtime_error("mod: the state's decisions do not match its cells");
    }

    std::vector<uint8_t> dropped(n);
    if (n > 0) {
        io.read(dropped.data(), n);
    }
    for (uint32_t i = 0; i < n; ++i) {
        c.kv->v_cells[0].set_dropped(idxs[i], !c.routed || dropped[i] != 0);
        if (seq_id >= 0 && c.kv->get_cells(0).pos_get(idxs[i]) > base->seq_pos_max(seq_id)) {
            throw std::runtime_error("mod: the state's layers do not match");
        }
    }
}

void llama_kv_cache_mod::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id >= 0 && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)) {
        checkpoint_write(io, seq_id);
        return;
    }

    state_write_origins(io, seq_id, MOD_STATE_MAGIC);

    base->state_write(io, seq_id, flags);
    state_write_tokens(io, seq_id);

    const uint32_t n_groups = groups.size();
    io.write(&n_groups, sizeof(n_groups));

    for (const auto & c : groups) {
        state_write_group(io, c, seq_id, flags);
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seq_id == -1 || s == seq_id) {
            state_write_info(io, s);
        }
    }
    if (recr) {
        recr->state_write(io, seq_id);
    }
}

void llama_kv_cache_mod::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id >= 0 && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)) {
        checkpoint_read(io, seq_id);
        return;
    }

    // a state that does not fit leaves everything as it is
    state_read_origins(io, MOD_STATE_MAGIC);

    touch_masks();

    try {
        // upstream leaves the cells alone where the state holds none for the sequence
        base->state_clear(seq_id);
        for (auto & c : groups) {
            c.kv->state_clear(seq_id);
            c.head = 0;
        }
        // not later: rows are written when all has been read, to the tensors of now, and others take their place where they shrink
        trim();

        llama_kv_cache::slot_info_vec_t sinfos;
        base->state_read_sinfo(io, seq_id, flags, &sinfos, nullptr);
        state_read_tokens(io, sinfos[0].empty() ? std::vector<uint32_t>() : sinfos[0].idxs[0]);

        uint32_t n_groups;
        io.read(&n_groups, sizeof(n_groups));
        if (n_groups != groups.size()) {
            throw std::runtime_error("mod: the state belongs to a model with other routed layers");
        }

        for (auto & c : groups) {
            state_read_group(io, c, seq_id, flags);
        }

        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
            if (seq_id == -1 || s == seq_id) {
                state_read_info(io, s);
            }
        }
        if (recr) {
            recr->state_read(io, seq_id);
        }
    } catch (...) {
        // never leave a state of which some layers are missing
        if (seq_id == -1) {
            clear(true);
        } else {
            forget(seq_id);
        }
        throw;
    }
}

void llama_kv_cache_mod::forget(llama_seq_id seq_id) {
    base_rows->wipe(seq_id);
    for (auto & c : groups) {
        c.rows->wipe(seq_id);
        c.head = 0;
    }
    if (recr) {
        recr->remove(seq_id);
    }
    seqs[seq_id] = no_tokens();
    trim();
}
