#include "llama-mod-rows.h"

#include "llama-impl.h"
#include "llama-mod.h"
#include "llama-mod-buffer.h"
#include "llama-mod-pool.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

// graphs read a number of cells that is padded to this, see llama_kv_cache::get_n_kv()
static constexpr uint32_t MOD_N_PAD = 256;

// what must be left when rows are made usable: the lists of a cell in use, and the graph of the batch. Without it the
// next small allocation would fail where that is no error to be handled
static constexpr size_t MOD_N_BYTES_CELL  = 32;
static constexpr size_t MOD_N_BYTES_GRAPH = 1 << 20;

std::pair<llama_mod_kv_mode, const char *> llama_mod_rows::choose_mode(const llama_model & model, bool v_trans, bool offload) {
    // lazy is chosen anyway, where it is possible
    const char * env = getenv("LLAMA_MOD_KV");
    if (env && strcmp(env, mode_name(LLAMA_MOD_KV_LAZY)) != 0) {
        for (const auto mode : { LLAMA_MOD_KV_GROW, LLAMA_MOD_KV_FULL, LLAMA_MOD_KV_POOL }) {
            if (strcmp(env, mode_name(mode)) == 0) {
                return { mode, "LLAMA_MOD_KV" };
            }
        }
        throw std::runtime_error(format("LLAMA_MOD_KV=%s: known are lazy, grow, full and pool", env));
    }

    if (v_trans) {
        return { LLAMA_MOD_KV_GROW, "without flash attention V is transposed" };
    }

    for (int32_t il = 0; offload && il < (int32_t) model.hparams.n_layer(); ++il) {
        auto * buft = ggml_backend_dev_buffer_type(model.dev_layer(il));
        if (llama_mod_kv_buft(buft) == buft) {
            return { LLAMA_MOD_KV_GROW, "the device cannot commit memory on demand" };
        }
    }
    auto * cpu = ggml_backend_cpu_buffer_type();
    if (llama_mod_kv_buft(cpu) == cpu) {
        return { LLAMA_MOD_KV_GROW, "the system cannot commit memory on demand" };
    }
    return { LLAMA_MOD_KV_LAZY, "committed as cells are used" };
}

const char * llama_mod_rows::mode_name(llama_mod_kv_mode mode) {
    switch (mode) {
        case LLAMA_MOD_KV_LAZY: return "lazy";
        case LLAMA_MOD_KV_GROW: return "grow";
        case LLAMA_MOD_KV_FULL: return "full";
        case LLAMA_MOD_KV_POOL: return "pool";
    }
    return "";
}

llama_mod_kv_mode llama_mod_rows::choose_part_mode(llama_mod_kv_mode mode, const llama_model & model, bool offload) {
    for (int32_t il = 0; offload && mode == LLAMA_MOD_KV_LAZY && il < (int32_t) model.hparams.n_layer(); ++il) {
        if (!ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(model.dev_layer(il)))) {
            return LLAMA_MOD_KV_POOL;
        }
    }
    return mode;
}

// whose cache this thread is making, null: nobody's, an ordinary one
static thread_local const llama_mod_rows * making = nullptr;

ggml_backend_buffer_type_t llama_mod_rows::choose_buft(ggml_backend_buffer_type_t buft) {
    if (!making) {
        return buft;
    }
    return making->mode == LLAMA_MOD_KV_POOL ? llama_mod_pool_buft(buft) : llama_mod_kv_buft(buft);
}

std::unique_ptr<llama_kv_cache> llama_mod_rows::make_cache(uint32_t n) const {
    struct scope {
        scope(const llama_mod_rows * rows) { making = rows; }
        ~scope() { making = nullptr; }
    } scope(this);

    return make(n);
}

llama_mod_rows::llama_mod_rows(llama_mod_kv_mode mode, uint32_t kv_size, make_t make) :
    make(std::move(make)), mode(mode), n_rows(grows() ? std::min(kv_size, MOD_N_PAD) : kv_size) {

    kv = make_cache(n_rows);

    // restoring a state asks for memory before it writes
    kv->reserve = [this](uint32_t n) { return reserve(n); };

    // there may be a cell for each token from the start, only the tensors grow
    kv->v_cells[0].resize(kv_size);
    kv->v_cells[0].keep_tokens(kv->has_cell_ext());

    GGML_ASSERT(kv->n_stream == 1);

    // a context that is only measured has no memory
    const bool has_data = !kv->hparams.no_alloc;
    if (mode == LLAMA_MOD_KV_FULL && has_data && !reserve(kv_size)) {
        throw std::runtime_error("failed to allocate buffer for kv cache");
    }
}

const llama_mod_cells & llama_mod_rows::cells() const {
    return kv->v_cells[0];
}

template <typename F> void llama_mod_rows::for_rows(uint32_t i0, uint32_t i1, F f) const {
    for (const auto & l : kv->layers) {
        for (auto * t : { l.k, l.v }) {
            if (!t) {
                continue;
            }
            if (!is_transposed(l, t)) {
                f(t->buffer, (char *) t->data + i0*t->nb[1], (i1 - i0)*t->nb[1]);
            } else if (i0 == 0 && i1 >= n_usable) {
                f(t->buffer, (char *) t->data, ggml_nbytes(t));
            }
        }
    }
}

bool llama_mod_rows::reserve(uint32_t n) {
    n = std::min<uint32_t>(GGML_PAD(std::max(n, 1u), MOD_N_PAD), cells().size());
    if (n <= n_usable) {
        return true;
    }
    if (n > n_rows && !grow(n)) {
        return false;
    }

    bool ok = true;
    for_rows(n_usable, n, [&](auto... range) { ok = ok && llama_mod_kv_commit(range...); });
    if (!ok || !llama_mod_has_memory(MOD_N_BYTES_GRAPH + (n - n_usable)*MOD_N_BYTES_CELL)) {
        for_rows(n_usable, n, llama_mod_kv_release);
        return false;
    }

    n_usable = n;
    return true;
}

void llama_mod_rows::trim_tail() {
    const uint32_t n_used = cells().used_max_p1();
    const uint32_t n      = std::min<uint32_t>(GGML_PAD(n_used, MOD_N_PAD), n_usable);

    for_rows(n_used, n, llama_mod_kv_discard);

    if (mode == LLAMA_MOD_KV_FULL) {
        for_rows(n, n_usable, llama_mod_kv_discard);
    } else {
        for_rows(n, n_usable, llama_mod_kv_release);
        n_usable = n;
    }
}

void llama_mod_rows::trim() {
    trim_tail();

    const auto & c = cells();
    for (uint32_t i = 0, n_used = c.used_max_p1(); i < n_used; ++i) {
        const uint32_t i0 = i;
        while (c.is_empty(i)) {
            ++i; // the last one is in use
        }
        if (i > i0) {
            for_rows(i0, i, llama_mod_kv_discard);
        }
    }
}

//
// growth
//

// the cells [i0, i0 + n) of a tensor: one piece, or with V transposed one of each of its rows
struct cell_range {
    cell_range(const ggml_tensor * t, bool trans, uint32_t i0, uint32_t n) {
        const size_t cell = trans ? ggml_element_size(t) : t->nb[1];

        offset   = i0*cell;
        size     = n*cell;
        n_pieces = trans ? t->ne[0] : 1;
        stride   = trans ? t->ne[1]*cell : 0;
    }

    void read(const ggml_tensor * t, std::vector<uint8_t> & data) const {
        data.resize(size*n_pieces);
        ggml_backend_tensor_get_2d(t, data.data(), offset, size, n_pieces, stride, size);
    }

    void write(ggml_tensor * t, const std::vector<uint8_t> & data) const {
        ggml_backend_tensor_set_2d(t, data.data(), offset, size, n_pieces, stride, size);
    }

    void zero(ggml_tensor * t) const {
        for (size_t i = 0; i < n_pieces; ++i) {
            ggml_backend_tensor_memset(t, 0, offset + i*stride, size);
        }
    }

    size_t offset;
    size_t size;
    size_t n_pieces;
    size_t stride;
};

bool llama_mod_rows::grow(uint32_t n) {
    if (kv->layers.empty()) {
        n_rows = n;
        return true;
    }

    // a quarter more than there is, so that a row is copied a few times in all
    const uint32_t n_more = std::min<uint32_t>(GGML_PAD(n_rows + n_rows/4, MOD_N_PAD), cells().size());

    return (n_more > n && replace(n_more)) || replace(n);
}

void llama_mod_rows::shrink() {
    const uint32_t n = std::min<uint32_t>(GGML_PAD(std::max(cells().used_max_p1(), 1u), MOD_N_PAD), cells().size());
    if (grows() && 3*n <= 2*n_rows && !kv->hparams.no_alloc && !kv->layers.empty()) {
        replace(n);
    }
}

bool llama_mod_rows::replace(uint32_t n) try {
    auto next = make_cache(n);

    if (synchronize) {
        synchronize();
    }

    std::vector<uint8_t> data;

    // its tensors become those of the cache, whose cells stay; a state that is being read may have cells without rows
    const uint32_t n_used = std::min(cells().used_max_p1(), n_usable);
    for (size_t i = 0; i < kv->layers.size(); ++i) {
        const auto & l      = kv->layers[i];
        const auto & l_next = next->layers[i];

        for (const auto & [src, dst] : { std::pair(l.k, l_next.k), std::pair(l.v, l_next.v) }) {
            if (!src) {
                continue;
            }
            const bool trans = is_transposed(l, src);
            if (!llama_mod_kv_commit(dst->buffer, dst->data, trans ? ggml_nbytes(dst) : std::min(n_usable, n)*dst->nb[1])) {
                return false;
            }
            cell_range(src, trans, 0, n_used).read (src, data);
            cell_range(dst, trans, 0, n_used).write(dst, data);
        }
    }

    std::swap(kv->layers,    next->layers);
    std::swap(kv->ctxs_bufs, next->ctxs_bufs);

    n_rows   = n;
    n_usable = std::min(n_usable, n);
    n_grown++;

    return true;
} catch (const std::exception &) {
    return false; // no memory
}

void llama_mod_rows::wipe(llama_seq_id seq_id) {
    auto & c = kv->v_cells[0];

    for (uint32_t i = 0; i < c.size(); ++i) {
        if (c.is_empty(i) || !c.seq_has(i, seq_id) || !c.seq_rm(i, seq_id) || i >= n_usable) {
            continue;
        }
        for (const auto & l : kv->layers) {
            for (auto * t : { l.k, l.v }) {
                if (t) {
                    cell_range(t, is_transposed(l, t), i, 1).zero(t);
                }
            }
        }
    }
    kv->v_heads[0] = 0;
}

//
// defragmentation
//

bool llama_mod_rows::is_sparse() const {
    const uint32_t n_used = cells().get_used();
    const uint32_t n_max  = cells().used_max_p1();

    // attention reads steps of MOD_N_PAD cells: at least one has to be gained, and a tenth of the time and memory
    return GGML_PAD(n_used, MOD_N_PAD) < GGML_PAD(n_max, MOD_N_PAD) && 11*n_used < 10*n_max;
}

void llama_mod_rows::compact() {
    if (!is_sparse()) {
        return;
    }

    auto & c = kv->v_cells[0];

    const uint32_t n_used = c.get_used();
    const uint32_t n_max  = c.used_max_p1();

    std::vector<std::pair<uint32_t, uint32_t>> moves;
    for (uint32_t src = n_used, dst = 0; src < n_max; ++src) {
        if (c.is_empty(src)) {
            continue;
        }
        while (!c.is_empty(dst)) {
            ++dst;
        }

        c.mv(src, dst);
        moves.push_back({ src, dst });
    }

    move_rows(moves);

    kv->v_heads[0] = n_used;
    trim_tail();
    shrink();
}

void llama_mod_rows::move_rows(const std::vector<std::pair<uint32_t, uint32_t>> & moves) {
    std::vector<uint8_t> data;

    const auto move_runs = [&](ggml_tensor * t) {
        for (size_t i = 0, n = 1; i < moves.size(); i += n, n = 1) {
            const auto [src, dst] = moves[i];
            while (i + n < moves.size() && moves[i + n] == std::pair<uint32_t, uint32_t>(src + n, dst + n)) {
                ++n;
            }
            cell_range(t, false, src, n).read (t, data);
            cell_range(t, false, dst, n).write(t, data);
        }
    };

    // each move would touch every row: all at once instead
    const auto move_transposed = [&](ggml_tensor * t) {
        const cell_range all(t, true, 0, moves.back().first + 1);
        const size_t     size = ggml_element_size(t);

        all.read(t, data);
        for (size_t piece = 0; piece < data.size(); piece += all.size) {
            for (const auto & [src, dst] : moves) {
                memcpy(&data[piece + dst*size], &data[piece + src*size], size);
            }
        }
        all.write(t, data);
    };

    for (const auto & l : kv->layers) {
        for (auto * t : { l.k, l.v }) {
            if (t && is_transposed(l, t)) {
                move_transposed(t);
            } else if (t) {
                move_runs(t);
            }
        }
    }
}

//
// statistics
//

size_t llama_mod_rows::bytes_per_cell() const {
    size_t res = 0;
    for (const auto & l : kv->layers) {
        for (const auto * t : { l.k, l.v }) {
            res += t ? t->nb[1] : 0;
        }
    }
    return res;
}

void llama_mod_rows::add_stats(int32_t il, llama_mod_kv_stats & stats) const {
    const auto & c = cells();

    for (const auto & l : kv->layers) {
        if (il >= 0 && (int32_t) l.il != il) {
            continue;
        }

        size_t per_cell = 0;
        for (const auto * t : { l.k, l.v }) {
            if (t) {
                per_cell              += t->nb[1];
                stats.bytes_reserved  += n_rows*t->nb[1];
                stats.bytes_committed += llama_mod_kv_backed(t->buffer, t->data, n_rows*t->nb[1]);
            }
        }

        stats.n_cells        += c.size();
        stats.n_used         += c.get_used();
        stats.bytes_per_cell += per_cell;
        stats.bytes_used     += per_cell*c.get_used();
    }
}
