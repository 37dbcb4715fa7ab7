#include "llama-kv-cache-mod.h"

#include "llama-io.h"

#include <algorithm>
#include <stdexcept>

// the first bytes of a state. The second number counts the formats: a state of another one is refused
static constexpr uint32_t MOD_STATE_MAGIC   = 0x53446f4d; // "MoDS"
static constexpr uint32_t MOD_STATE_VERSION = 4;

//
// state
//

void llama_kv_cache_mod::state_write_origins(llama_io_write_i & io, llama_seq_id seq_id) const {
    std::vector<const llama_mod_origin *> origins;
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if ((seq_id == -1 || s == seq_id) && seqs[s].origin && base->seq_pos_max(s) >= 0) {
            origins.push_back(seqs[s].origin.get());
        }
    }

    const uint32_t head[3] = { MOD_STATE_MAGIC, MOD_STATE_VERSION, (uint32_t) origins.size() };
    io.write(head, sizeof(head));
    for (const auto * o : origins) {
        o->write(io);
    }
}

void llama_kv_cache_mod::state_read_origins(llama_io_read_i & io) {
    uint32_t head[3];
    io.read(head, sizeof(head));
    if (head[0] != MOD_STATE_MAGIC || head[1] != MOD_STATE_VERSION) {
        throw std::runtime_error("mod: the state has another format: it is of another version of this library, or of a dense model");
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
    state_write_origins(io, seq_id);

    base->state_write(io, seq_id, flags);

    const uint32_t n_groups = groups.size();
    io.write(&n_groups, sizeof(n_groups));

    for (const auto & c : groups) {
        state_write_group(io, c, seq_id, flags);
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seq_id == -1 || s == seq_id) {
            std::vector<int32_t> info = { seqs[s].broken };
            for (const auto & left : seqs[s].left) {
                info.push_back(left.freed);
            }
            io.write(info.data(), info.size()*sizeof(info[0]));
        }
    }
}

void llama_kv_cache_mod::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    // a state that does not fit leaves everything as it is
    state_read_origins(io);

    touch_masks();

    try {
        // upstream leaves the cells alone where the state holds none for the sequence
        base->state_clear(seq_id);
        base->state_read(io, seq_id, flags);

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
                std::vector<int32_t> info(1 + windows.size());
                io.read(info.data(), info.size()*sizeof(info[0]));

                seqs[s] = no_tokens();
                if (base->seq_pos_max(s) >= 0) {
                    for (size_t w = 0; w < windows.size(); ++w) {
                        seqs[s].left[w].freed = std::max(-1, info[1 + w]);
                    }
                    seqs[s].broken = info[0] != 0;
                    seqs[s].origin = get_origin();
                }
            }
        }

        trim();
    } catch (...) {
        // never leave a state of which some layers are missing
        if (seq_id == -1) {
            clear(true);
        } else {
            base_rows->wipe(seq_id);
            for (auto & c : groups) {
                c.rows->wipe(seq_id);
                c.head = 0;
            }
            seqs[seq_id] = no_tokens();
            trim();
        }
        throw;
    }
}
