#include "llama-mod-mask.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>

// a longer log would cost more than a scan
static constexpr size_t MOD_N_LOG = 8192;

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
    log.clear();
    epoch++;
}

template <typename T>
void llama_mod_mask::fill_rows(ggml_tensor * mask, const llama_ubatch & ubatch, const llama_kv_cells & cells,
        const std::vector<uint8_t> & dropped, const llama_mod_window & window) {
    const uint32_t n_kv = mask->ne[0];

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id s = ubatch.seq_id[i][0];
        const llama_pos    p = ubatch.pos[i];

        auto & row = rows[s];

        const size_t n_old = row.data.size()*sizeof(uint32_t)/sizeof(T);
        if (n_old < n_kv) {
            row.data.resize((n_kv*sizeof(T) + sizeof(uint32_t) - 1)/sizeof(uint32_t));
        }
        const uint32_t n = row.data.size()*sizeof(uint32_t)/sizeof(T);
        T * data = (T *) row.data.data();

        // cells from n_old on were empty when the row was last used
        for (uint32_t j = n_old; j < n; ++j) {
            data[j] = hidden<T>();
        }

        const llama_pos first = window.first(p);

        const auto set = [&](uint32_t j) {
            const bool seen = !cells.is_empty(j) && cells.seq_has(j, s) && cells.pos_get(j) <= p &&
                (dropped.empty() || !dropped[j] || cells.pos_get(j) >= first);
            data[j] = seen ? 0 : hidden<T>();
        };

        if (row.epoch != epoch || p < row.pos) {
            const uint32_t n_used = std::min(n, cells.used_max_p1());
            for (uint32_t j = 0; j < n_used; ++j) {
                set(j);
            }
            for (uint32_t j = n_used; j < n; ++j) {
                data[j] = hidden<T>();
            }
        } else {
            for (size_t k = row.n_log; k < log.size(); ++k) {
                if (log[k] < n) {
                    set(log[k]);
                }
            }
            const auto & sp = cells.seq_pos_get(s);
            // what has come into sight
            for (auto it = sp.lower_bound({ row.pos + 1, 0 }); it != sp.end() && it->first <= p; ++it) {
                set(it->second);
            }
            // what has left the window
            if (!dropped.empty()) {
                for (auto it = sp.lower_bound({ window.first(row.pos), 0 }); it != sp.end() && it->first < first; ++it) {
                    set(it->second);
                }
            }
        }

        row.epoch = epoch;
        row.pos   = p;
        row.n_log = log.size();

        memcpy((char *) mask->data + i*mask->nb[1], data, n_kv*sizeof(T));
    }
}

void llama_mod_mask::fill(ggml_tensor * mask, const llama_ubatch & ubatch, const llama_kv_cells & cells,
        const std::vector<uint8_t> & dropped, const llama_mod_window & window) {
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));

    if (mask->type == GGML_TYPE_F16) {
        fill_rows<uint16_t>(mask, ubatch, cells, dropped, window);
    } else {
        fill_rows<uint32_t>(mask, ubatch, cells, dropped, window);
    }
}
