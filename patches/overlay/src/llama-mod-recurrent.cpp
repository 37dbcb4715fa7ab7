#include "llama-mod-recurrent.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-mod-arch.h"
#include "llama-model.h"

#include <algorithm>
#include <set>
#include <stdexcept>

llama_mod_recurrent::llama_mod_recurrent(const llama_model & model, const llama_cparams & cparams) :
    n_seq_max(std::max<uint32_t>(1, cparams.n_seq_max)),
    mem(model, GGML_TYPE_F32, GGML_TYPE_F32, cparams.offload_kqv, 2*n_seq_max, 2*n_seq_max, cparams.n_rs_seq,
        [&model](int32_t il) { return llama_mod_arch_has_state(model, il); }),
    ctx(&mem, {}), ctx_full(&mem), n_back(n_seq_max), shadowed(n_seq_max) {
}

std::vector<llama_ubatch> llama_mod_recurrent::split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    std::vector<llama_ubatch> res;

    // as llama_memory_hybrid::init_batch()
    balloc.split_reset();
    while (true) {
        const uint32_t n_keep = mem.n_rs_seq > 0 ? mem.n_rs_seq + 1 : 0;

        auto ubatch = embd_all ? balloc.split_seq(n_ubatch) : balloc.split_equal(n_ubatch, /*sequential =*/ false, n_keep);
        if (ubatch.n_tokens == 0) {
            break;
        }
        res.push_back(std::move(ubatch));
    }
    for (const auto & ubatch : res) {
        for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
            if (!is_known(ubatch.seq_id_unq[s])) {
                LLAMA_LOG_ERROR("%s: there are recurrent states for %u sequences, none for sequence %d\n", __func__, n_seq_max, ubatch.seq_id_unq[s]);
                return {};
            }
        }
    }
    if (balloc.get_n_used() < balloc.get_n_tokens() || !mem.prepare(res)) {
        res.clear();
    }
    return res;
}

//
// one decode
//

int32_t llama_mod_recurrent::find_own(const llama_ubatch & ubatch, uint32_t s) const {
    const uint32_t i = s*ubatch.n_seq_tokens;

    const int32_t tail = mem.cells[ubatch.seq_id[i][0]].tail;
    if (tail < 0) {
        return -1;
    }
    // sequences that share the token share the cell
    const std::set<llama_seq_id> all(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i]);
    const auto & has = mem.cells[tail].seq_id;

    return std::includes(all.begin(), all.end(), has.begin(), has.end()) ? tail : -1;
}

int32_t llama_mod_recurrent::find_row(const llama_ubatch & ubatch) const {
    // upstream's memory begins its search at the front if its head is beyond
    const uint32_t n_max = std::min(mem.size - ubatch.n_seqs, mem.used + 2*ubatch.n_seqs);

    for (uint32_t row = 0; row <= n_max; ++row) {
        uint32_t s = 0;
        while (s < ubatch.n_seqs) {
            const int32_t own = find_own(ubatch, s);
            if (own < 0 ? !mem.cells[row + s].is_empty() : own != (int32_t) (row + s)) {
                break;
            }
            ++s;
        }
        if (s == ubatch.n_seqs) {
            return row;
        }
    }
    return -1;
}

void llama_mod_recurrent::make_row(const llama_ubatch & ubatch) {
    synchronize();

    for (uint32_t s = 0; s < ubatch.n_seqs; ++s) {
        int32_t cell = find_own(ubatch, s);
        if (cell < 0) {
            // each sequence has at most a cell and that of its shadow
            cell = s;
            while (!mem.cells.at(cell).is_empty()) {
                ++cell;
            }
        }
        if (cell != (int32_t) s) {
            swap_cells(cell, s);
        }
    }
}

void llama_mod_recurrent::swap_cells(uint32_t a, uint32_t b) {
    std::vector<uint8_t> data[2];
    for (const auto * tensors : { &mem.r_l, &mem.s_l, &mem.p_l }) {
        for (auto * t : *tensors) {
            for (uint32_t plane = 0; t && plane <= mem.n_rs_seq; ++plane) {
                const size_t at[] = { (plane*mem.size + a)*t->nb[1], (plane*mem.size + b)*t->nb[1] };
                for (int i = 0; i < 2; ++i) {
                    data[i].resize(t->nb[1]);
                    ggml_backend_tensor_get(t, data[i].data(), at[i], t->nb[1]);
                }
                for (int i = 0; i < 2; ++i) {
                    ggml_backend_tensor_set(t, data[i].data(), at[1 - i], t->nb[1]);
                }
            }
        }
    }

    for (const uint32_t i : { a, b }) {
        auto & cell = mem.cells[i];
        cell.src = cell.src < 0 ? -1 : i == a ? b : a; // a cell at rest is its own source
    }
    std::swap(mem.cells[a].pos,    mem.cells[b].pos);
    std::swap(mem.cells[a].src,    mem.cells[b].src);
    std::swap(mem.cells[a].seq_id, mem.cells[b].seq_id);
    for (auto & cell : mem.cells) {
        cell.tail = cell.tail == (int32_t) a ? b : cell.tail == (int32_t) b ? a : cell.tail;
    }
}

void llama_mod_recurrent::place(const llama_ubatch & ubatch) {
    if (rs_idx.empty()) {
        rs_idx        = mem.rs_idx;
        n_back_before = n_back;
    }
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];
        if (!shadowed[seq_id]) {
            shadowed[seq_id] = true;
            mem.seq_cp(seq_id, shadow(seq_id), -1, -1);
        }
        n_back[seq_id] = std::min(mem.n_rs_seq, ubatch.n_seq_tokens - 1);
    }

    // upstream's memory would move other cells in its graph, which may fail
    if (find_row(ubatch) < 0) {
        make_row(ubatch);
    }
    mem.head = find_row(ubatch);
    mem.find_slot(ubatch);

    // asked once: what is to be rolled back is forgotten then
    copies.clear();
    for (uint32_t i = 0; i < mem.n; ++i) {
        copies.push_back(ctx.s_copy(i));
    }
}

void llama_mod_recurrent::keep() {
    for (uint32_t s = 0; s < n_seq_max; ++s) {
        if (shadowed[s]) {
            mem.seq_rm(shadow(s), -1, -1);
        }
    }
    shadowed.assign(n_seq_max, false);
    rs_idx.clear();
}

void llama_mod_recurrent::undo() {
    for (uint32_t s = 0; s < n_seq_max; ++s) {
        if (shadowed[s]) {
            mem.seq_rm(s, -1, -1);
            mem.seq_cp(shadow(s), s, -1, -1);
        }
    }
    if (!rs_idx.empty()) {
        mem.rs_idx = rs_idx;
        n_back     = n_back_before;
    }
    keep();
}

//
// sequences
//

bool llama_mod_recurrent::has_state(llama_seq_id seq_id) const {
    return is_known(seq_id) && mem.cells[seq_id].tail >= 0;
}

llama_pos llama_mod_recurrent::first_end(llama_seq_id seq_id, llama_pos p_max) const {
    return has_state(seq_id) ? p_max - (llama_pos) n_back[seq_id] : p_max + 1;
}

void llama_mod_recurrent::end(llama_seq_id seq_id, llama_pos p) {
    if (has_state(seq_id) && p < mem.cells[mem.cells[seq_id].tail].pos) {
        mem.seq_rm(seq_id, p + 1, -1);
        n_back[seq_id] = 0; // once
    }
}

void llama_mod_recurrent::remove(llama_seq_id seq_id) {
    if (is_known(seq_id)) {
        mem.seq_rm(seq_id, -1, -1);
    }
}

void llama_mod_recurrent::copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    if (is_known(seq_id_src) && is_known(seq_id_dst)) {
        mem.seq_cp(seq_id_src, seq_id_dst, -1, -1);
        mem.set_rs_idx(seq_id_dst, mem.rs_idx[seq_id_src]);
        n_back[seq_id_dst] = n_back[seq_id_src];
    }
}

void llama_mod_recurrent::keep(llama_seq_id seq_id) {
    mem.seq_keep(seq_id);
}

void llama_mod_recurrent::move(llama_seq_id seq_id, llama_pos p) {
    if (has_state(seq_id)) {
        mem.cells[mem.cells[seq_id].tail].pos = p;
    }
}

void llama_mod_recurrent::clear(bool data) {
    mem.clear(data);
    keep();
}

void llama_mod_recurrent::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    if (seq_id >= 0 && !is_known(seq_id)) {
        throw std::runtime_error(format("mod: there is no recurrent state for sequence %d", seq_id));
    }
    mem.state_read(io, seq_id);
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        if (seq_id < 0 || s == seq_id) {
            n_back[s] = 0;
        }
    }
}
