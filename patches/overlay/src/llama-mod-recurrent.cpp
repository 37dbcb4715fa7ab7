#include "llama-mod-recurrent.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-mod-arch.h"
#include "llama-model.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <stdexcept>

llama_mod_recurrent::llama_mod_recurrent(const llama_model & model, const llama_cparams & cparams) :
    n_seq_max(std::max<uint32_t>(1, cparams.n_seq_max)),
    mem(model, GGML_TYPE_F32, GGML_TYPE_F32, cparams.offload_kqv, 2*n_seq_max, 2*n_seq_max, cparams.n_rs_seq,
        [&model](int32_t il) { return llama_mod_arch_has_state(model, il); }),
    ctx(&mem, {}), ctx_full(&mem), n_back(n_seq_max), shadowed(n_seq_max) {
    // the states to go back to are those of one ubatch
    if (mem.n_rs_seq > 0 && cparams.n_ubatch <= mem.n_rs_seq + 1) {
        throw std::runtime_error(format("mod: ubatches of %u tokens are too small to take %u tokens back: n_ubatch has to be %u at least",
                cparams.n_ubatch, mem.n_rs_seq, mem.n_rs_seq + 2));
    }
}

// how many tokens before its last one the s-th sequence of the ubatch can end, at the most; positions may repeat or jump
static uint32_t mod_count_back(const llama_ubatch & ubatch, uint32_t s) {
    const uint32_t last = (s + 1)*ubatch.n_seq_tokens - 1;

    uint32_t n = 0;
    while (n + 1 < ubatch.n_seq_tokens && ubatch.pos[last - n - 1] == ubatch.pos[last - n] - 1) {
        ++n;
    }
    return n;
}

// do all tokens of each run of a sequence belong to the same sequences? a state is that of all of them
static bool mod_has_whole_runs(const llama_ubatch & ubatch) {
    for (uint32_t i = 1; i < ubatch.n_tokens; ++i) {
        if (i % ubatch.n_seq_tokens != 0 && ubatch.n_seq_id[i] != ubatch.n_seq_id[i - 1]) {
            return false;
        }
    }
    return true;
}

std::vector<llama_ubatch> llama_mod_recurrent::split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    std::vector<llama_ubatch> res;

    // upstream's equal split takes a sequence more than fit
    const auto & batch = balloc.get_batch();
    std::set<llama_seq_id> seqs;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        seqs.insert(batch.seq_id[i][0]);
    }
    n_ubatch -= !embd_all && seqs.size() > n_ubatch;

    // as llama_memory_hybrid::init_batch()
    const uint32_t n_keep = mem.n_rs_seq > 0 ? std::min(mem.n_rs_seq + 1, n_ubatch - 1) : 0;
    balloc.split_reset();
    while (true) {
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
        if (!mod_has_whole_runs(ubatch)) {
            LLAMA_LOG_ERROR("%s: a recurrent state is of all its tokens: tokens of several sequences cannot be embedded together with those of one\n", __func__);
            return {};
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
            cell = find_empty(s);
        }
        if (cell != (int32_t) s) {
            swap_cells(cell, s);
        }
    }
}

uint32_t llama_mod_recurrent::find_empty(uint32_t first) const {
    // each sequence has at most a cell and that of its shadow
    while (!mem.cells.at(first).is_empty()) {
        ++first;
    }
    return first;
}

std::vector<ggml_tensor *> llama_mod_recurrent::tensors() const {
    std::vector<ggml_tensor *> res;
    for (const auto * some : { &mem.r_l, &mem.s_l, &mem.p_l }) {
        std::copy_if(some->begin(), some->end(), std::back_inserter(res), [](const auto * t) { return t; });
    }
    return res;
}

void llama_mod_recurrent::swap_cells(uint32_t a, uint32_t b) {
    std::vector<uint8_t> data[2];
    for (auto * t : tensors()) {
        for (uint32_t plane = 0; plane <= mem.n_rs_seq; ++plane) {
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
    for (uint32_t s = 0; s < ubatch.n_seqs; ++s) {
        const uint32_t i = s*ubatch.n_seq_tokens;
        const uint32_t n = std::min(mem.n_rs_seq, mod_count_back(ubatch, s));
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            const llama_seq_id seq_id = ubatch.seq_id[i][j];
            if (!shadowed[seq_id]) {
                shadowed[seq_id] = true;
                mem.seq_cp(seq_id, shadow(seq_id), -1, -1);
            }
            n_back[seq_id] = n;
        }
    }

    // upstream's memory would move other cells in its graph, which may fail
    if (find_row(ubatch) < 0) {
        make_row(ubatch);
    }
    mem.head = find_row(ubatch);
    mem.find_slot(ubatch);

    // asked once: what is to be rolled back is forgotten then, of the first of the sequences that share a token
    copies.clear();
    for (uint32_t i = 0; i < mem.n; ++i) {
        copies.push_back(ctx.s_copy(i));
    }
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        mem.set_rs_idx(ubatch.seq_id_unq[s], 0);
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
    if (!has_state(seq_id)) {
        return;
    }
    const auto & cell = mem.cells[mem.cells[seq_id].tail];
    if (p >= cell.pos) {
        return;
    }
    n_back[seq_id] = 0; // once

    // upstream's memory takes it back when the next graph reads it; the position belongs to the cell
    if (cell.seq_id.size() > 1) {
        leave_shared(seq_id, cell.pos - p, p);
    } else {
        mem.seq_rm(seq_id, p + 1, -1);
    }
}

void llama_mod_recurrent::leave_shared(llama_seq_id seq_id, uint32_t n, llama_pos p) {
    synchronize();

    const uint32_t from = mem.cells[seq_id].tail;
    const uint32_t to   = find_empty(0);

    std::vector<uint8_t> data;
    for (auto * t : tensors()) {
        data.resize(t->nb[1]);
        ggml_backend_tensor_get(t, data.data(), (n*mem.size + from)*t->nb[1], data.size());
        ggml_backend_tensor_set(t, data.data(), to*t->nb[1], data.size());
    }

    mem.cells[from].seq_id.erase(seq_id);
    mem.cells[to].seq_id.insert(seq_id);
    mem.cells[to].pos = p;
    mem.cells[to].src = to;
    mem.cells[seq_id].tail = to;
    mem.used++;
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
    // upstream's seq_keep() leaves what the others were to be rolled back
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        if (s != seq_id) {
            remove(s);
        }
    }
}

void llama_mod_recurrent::move(llama_seq_id seq_id, llama_pos p) {
    if (has_state(seq_id)) {
        mem.cells[mem.cells[seq_id].tail].pos = p;
    }
}

void llama_mod_recurrent::fix(llama_seq_id seq_id) {
    if (is_known(seq_id)) {
        n_back[seq_id] = 0;
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
