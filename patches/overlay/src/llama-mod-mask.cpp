#include "llama-mod-mask.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-mod-cells.h"

#include "ggml-backend.h"

#include <algorithm>

// a longer log would cost more than a scan
static constexpr size_t MOD_N_LOG = 2048;

// -inf
template <typename T> static constexpr T hidden();

template <> constexpr uint16_t hidden<uint16_t>() { return 0xFC00; }
template <> constexpr uint32_t hidden<uint32_t>() { return 0xFF800000; }

void llama_mod_mask::touch(uint32_t idx) {
    if (log.size() >= MOD_N_LOG) {
        touch_all();
    }
    log.push_back(idx);
}

void llama_mod_mask::touch_all() {
    log = {};
    rows.clear();
}

void llama_mod_mask::update(llama_seq_id s, llama_pos p, const llama_mod_cells & cells, const llama_mod_window & window) {
    auto & row = rows[s];

    const uint32_t  n     = cells.used_max_p1();
    const llama_pos first = window.first(p);
    const bool      scan  = p < row.pos || row.seen.empty();

    // cells beyond those of the row have been touched since, or are empty
    if (row.seen.capacity() < n || row.seen.capacity() > n + n/4 + 256) {
        std::vector<int8_t> seen;
        seen.reserve(n + n/8 + 64);
        seen.assign(row.seen.begin(), row.seen.begin() + std::min<size_t>(n, row.seen.size()));
        row.seen = std::move(seen);
    }
    row.seen.resize(n);

    const auto set = [&](uint32_t j) {
        const bool seen = !cells.is_empty(j) && cells.seq_has(j, s) && cells.pos_get(j) <= p &&
            (cells.pos_get(j) >= first || !cells.is_dropped(j));
        row.seen[j] = seen ? -1 : 0;
    };

    if (scan) {
        for (uint32_t j = 0; j < n; ++j) {
            set(j);
        }
    } else {
        for (size_t k = row.n_log; k < log.size(); ++k) {
            if (log[k] < n) {
                set(log[k]);
            }
        }
        const auto sp = cells.seq_pos_get(s);
        // what has come into sight
        for (auto it = sp.lower_bound({ row.pos + 1, 0 }); it != sp.end() && it->first <= p; ++it) {
            set(it->second);
        }
        // what has left the window
        if (window.size > 0) {
            for (auto it = sp.lower_bound({ window.first(row.pos), 0 }); it != sp.end() && it->first < first; ++it) {
                set(it->second);
            }
        }
    }

    row.pos   = p;
    row.n_log = log.size();
}

template <typename T>
static void write_row(T * dst, uint32_t n_kv, const std::vector<int8_t> & seen) {
    const uint32_t n = std::min<uint32_t>(n_kv, seen.size());
    for (uint32_t j = 0; j < n; ++j) {
        dst[j] = ~(T) seen[j] & hidden<T>();
    }
    std::fill(dst + n, dst + n_kv, hidden<T>());
}

// p: position of the query, which sees nothing behind it
template <typename T>
static void write_distances(T * dst, uint32_t n_kv, const std::vector<int8_t> & seen, const llama_mod_cells & cells, llama_pos p) {
    const uint32_t n = std::min<uint32_t>(n_kv, seen.size());
    for (uint32_t j = 0; j < n; ++j) {
        if (seen[j]) {
            dst[j] = llama_cast<T>((float) (cells.pos_get(j) - p));
        }
    }
}

void llama_mod_mask::fill(
        ggml_tensor * mask, const llama_ubatch & ubatch, const llama_mod_cells & cells, const llama_mod_window & window, bool alibi) {
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id s = ubatch.seq_id[i][0];

        update(s, ubatch.pos[i], cells, window);

        const auto & seen = rows[s].seen;

        auto * dst = (char *) mask->data + i*mask->nb[1];
        if (mask->type == GGML_TYPE_F16) {
            write_row((uint16_t *) dst, mask->ne[0], seen);
        } else {
            write_row((uint32_t *) dst, mask->ne[0], seen);
        }
        if (alibi && mask->type == GGML_TYPE_F16) {
            write_distances((ggml_fp16_t *) dst, mask->ne[0], seen, cells, ubatch.pos[i]);
        } else if (alibi) {
            write_distances((float *) dst, mask->ne[0], seen, cells, ubatch.pos[i]);
        }
    }

    const bool done = std::all_of(rows.begin(), rows.end(), [&](const auto & r) { return r.second.n_log == log.size(); });
    if (done) {
        log = {};
        for (auto & [_, row] : rows) {
            row.n_log = 0;
        }
    }
}
