#pragma once

#include "llama.h"

#include <cstdint>
#include <map>
#include <vector>

struct ggml_tensor;
struct llama_ubatch;

class llama_mod_cells;

// which keys a query sees that are visible in a window only. a later query's first one is never an earlier one, so what
// has left the window of a sequence's next query is gone for all of them
struct llama_mod_window {
    enum shape {
        sliding, // the last `size` positions, the query's included
        chunked, // those of the query's chunk of `size` positions
    };

    llama_pos size = 0; // 0: there is no window, all are seen
    shape     kind = sliding;

    // the first position that the query at position p >= 0 sees; no position is below 0
    llama_pos first(llama_pos p) const {
        return size == 0 ? 0 : kind == chunked ? p/size*size : p - size + 1;
    }

    // the last position whose query sees position p
    llama_pos last(llama_pos p) const {
        return kind == chunked ? first(p) + size - 1 : p + size - 1;
    }
};

// The KQ mask of one cache. From one query of a sequence to the next only a few cells change, so a row is kept for
// each sequence and brought up to date, whatever graph asks for it: a decode costs a few writes and a copy, not a
// scan of all cells.
class llama_mod_mask {
public:
    // the cell has been filled or emptied, or what is decided about it has changed
    void touch(uint32_t idx);

    // any cell may have changed
    void touch_all();

    // mask: F16 or F32 [n_kv, n_tokens], 0 where the query of a row sees a cell, else -inf
    // window: of the cells that are dropped (llama_mod_cells)
    // alibi: minus the distance in positions where 0 would be
    void fill(ggml_tensor * mask, const llama_ubatch & ubatch, const llama_mod_cells & cells, const llama_mod_window & window, bool alibi);

private:
    struct row {
        llama_pos pos   = -1; // of the last query
        size_t    n_log = 0;  // entries of the log that have been applied

        std::vector<int8_t> seen; // cells in use: -1 or 0
    };

    std::vector<uint32_t> log; // cells touched since some row was brought up to date

    std::map<llama_seq_id, row> rows;

    // the row of a query of sequence s at position p
    void update(llama_seq_id s, llama_pos p, const llama_mod_cells & cells, const llama_mod_window & window);
};
