// llama_mod_cells against llama_kv_cells: random operations, after which both say the same.
//
//   test-mod-cells [number of operations] [seed]

#undef NDEBUG

#include "llama-mod-cells.h"

#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <random>

static constexpr uint32_t N_CELLS = 700;

// few sequences have most of the cells
static const llama_seq_id SEQS[] = { 0, 0, 0, 0, 1, 1, 2, 3, 7, LLAMA_MAX_SEQ - 1 };

struct pair_of_cells {
    llama_kv_cells       ref;
    llama_mod_cells      mod;
    std::vector<uint8_t> dropped = std::vector<uint8_t>(N_CELLS); // llama_kv_cells has no flags

    std::mt19937 rng;

    explicit pair_of_cells(uint32_t seed) : rng(seed) {
        ref.resize(N_CELLS);
        mod.resize(N_CELLS);
    }

    uint32_t random(uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(rng); }

    llama_seq_id random_seq() { return SEQS[random(std::size(SEQS))]; }

    bool random_bool(double p) { return std::bernoulli_distribution(p)(rng); }

    // -1: there is none
    int64_t random_used() {
        if (ref.get_used() == 0) {
            return -1;
        }
        uint32_t i = random(ref.used_max_p1());
        while (ref.is_empty(i)) {
            i = (i + 1) % N_CELLS;
        }
        return i;
    }

    // a cell that became empty has no flag
    void settle(uint32_t i) {
        if (ref.is_empty(i)) {
            dropped[i] = 0;
        }
    }

    void put(uint32_t i) {
        const llama_seq_id s = random_seq();
        // nearly always in order, and sometimes twice the same position
        const llama_pos p = random_bool(0.9) ? ref.seq_pos_max(s) + random(3) : random(1000);

        llama_kv_cell_ext ext;
        ext.tok = random_bool(0.8) ? (llama_token) random(1000) : LLAMA_TOKEN_NULL;
        ext.x   = random_bool(0.2) ? (llama_pos) random(10) : 0;
        ext.y   = random_bool(0.2) ? (llama_pos) random(10) : 0;

        ref.pos_set(i, std::max(p, 0));
        mod.pos_set(i, std::max(p, 0));
        ref.ext_set(i, ext);
        mod.ext_set(i, ext);
        if (random_bool(0.99)) {
            ref.seq_add(i, s);
            mod.seq_add(i, s);
        }
        dropped[i] = random_bool(0.5);
        mod.set_dropped(i, dropped[i]);
    }

    void put_some() {
        uint32_t i = random_bool(0.5) ? 0 : random(N_CELLS);
        for (uint32_t n = random(20) + 1; n > 0 && i < N_CELLS; ++i) {
            if (ref.is_empty(i)) {
                put(i);
                n--;
            }
        }
    }

    void seq_rm_range() {
        const llama_seq_id s  = random_seq();
        const llama_pos    p0 = random(ref.seq_pos_max(s) + 2);
        const llama_pos    p1 = p0 + random(random_bool(0.2) ? 1000 : 30);
        for (uint32_t i = 0; i < N_CELLS; ++i) {
            assert(ref.pos_in(i, p0, p1) == mod.pos_in(i, p0, p1));
            if (ref.pos_in(i, p0, p1) && ref.seq_has(i, s)) {
                const bool empty = ref.seq_rm(i, s);
                assert(mod.seq_rm(i, s) == empty);
                settle(i);
            }
        }
    }

    void seq_cp_range() {
        const llama_seq_id src = random_seq(), dst = random_seq();
        const llama_pos    p0  = random(ref.seq_pos_max(src) + 2), p1 = p0 + random(200);
        for (uint32_t i = 0; i < N_CELLS; ++i) {
            if (ref.pos_in(i, p0, p1) && ref.seq_has(i, src) && !ref.seq_has(i, dst)) {
                ref.seq_add(i, dst);
                mod.seq_add(i, dst);
            }
        }
    }

    void shift_range() {
        const llama_seq_id s  = random_seq();
        const llama_pos    p0 = random(ref.seq_pos_max(s) + 2), p1 = random_bool(0.5) ? 100000 : p0 + random(100);
        const llama_pos    d  = (llama_pos) random(60) - 40;
        const bool         by = random_bool(0.2);
        for (uint32_t i = 0; i < N_CELLS; ++i) {
            if (!ref.pos_in(i, p0, p1) || !ref.seq_has(i, s)) {
                continue;
            }
            if (by) {
                ref.pos_div(i, 2);
                mod.pos_div(i, 2);
            } else {
                if (ref.pos_get(i) + d < 0) {
                    ref.ext_set(i, {}); // llama_kv_cells keeps it here, unlike in its other ways to empty a cell
                }
                const bool empty = ref.pos_add(i, d);
                assert(mod.pos_add(i, d) == empty);
                settle(i);
            }
        }
        check();
        if (random_bool(0.5)) {
            reset_shift();
        }
    }

    void reset_shift() {
        ref.reset_shift();
        mod.reset_shift();
    }

    // as llama_kv_cache::prepare(): place tokens, then go back
    void copy_and_set() {
        std::vector<uint32_t> idxs;
        for (uint32_t i = random(N_CELLS), n = random(30) + 1; i < N_CELLS && idxs.size() < n; i += random(3) + 1) {
            idxs.push_back(i);
        }
        reset_shift(); // copies have none
        const auto ref_old = ref.cp(idxs);
        const auto mod_old = mod.cp(idxs);
        const auto dropped_old = dropped;
        for (const uint32_t i : idxs) {
            if (!ref.is_empty(i) && random_bool(0.7)) {
                ref.rm(i);
                mod.rm(i);
                settle(i);
            }
            if (ref.is_empty(i) && random_bool(0.7)) {
                put(i);
            }
        }
        if (random_bool(0.8)) {
            ref.set(idxs, ref_old);
            mod.set(idxs, mod_old);
            dropped = dropped_old;
        }
    }

    // as llama_mod_rows::compact()
    void move() {
        const int64_t  src = random_used();
        const uint32_t dst = random(N_CELLS);
        if (src < 0 || !ref.is_empty(dst)) {
            return;
        }
        const auto pos = ref.pos_get(src);
        const auto ext = ref.ext_get(src);
        const auto set = ref.seq_get_all(src);
        if (ref.get_shift(src) != 0) {
            return; // llama_kv_cells has no way to move it
        }
        ref.rm(src);
        ref.pos_set(dst, pos);
        ref.ext_set(dst, ext);
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (set.test(s)) {
                ref.seq_add(dst, s);
            }
        }
        mod.mv(src, dst);
        dropped[dst] = dropped[src];
        settle(src);
    }

    void step() {
        const uint32_t what = random(1000);
        if (what < 600) {
            put_some();
        } else if (what < 850) {
            const int64_t i = random_used();
            if (i >= 0) {
                ref.rm(i);
                mod.rm(i);
                settle(i);
            }
        } else if (what < 900) {
            seq_rm_range();
        } else if (what < 920) {
            seq_cp_range();
        } else if (what < 940) {
            shift_range();
        } else if (what < 960) {
            copy_and_set();
        } else if (what < 990) {
            move();
        } else if (what < 996) {
            const llama_seq_id s = random_seq();
            for (uint32_t i = 0; i < N_CELLS; ++i) {
                if (!ref.is_empty(i) && ref.seq_get_all(i).none()) {
                    continue; // upstream: not with a cell of no sequence
                }
                const bool empty = ref.seq_keep(i, s);
                assert(mod.seq_keep(i, s) == empty);
                settle(i);
            }
        } else if (what < 998) {
            ref.reset();
            mod.reset();
            dropped.assign(N_CELLS, 0);
        } else {
            // one sequence after the other, from the front
            for (uint32_t i = 0; i < N_CELLS; ++i) {
                if (!ref.is_empty(i) && random_bool(0.9)) {
                    ref.rm(i);
                    mod.rm(i);
                    settle(i);
                }
            }
        }
    }

    void check() const {
        assert(ref.size()           == mod.size());
        assert(ref.get_used()       == mod.get_used());
        assert(ref.used_max_p1()    == mod.used_max_p1());
        assert(ref.get_has_shift()  == mod.get_has_shift());

        for (uint32_t i = 0; i < N_CELLS; ++i) {
            assert(ref.is_empty(i)    == mod.is_empty(i));
            assert(ref.seq_get_all(i) == mod.seq_get_all(i));
            assert(mod.is_dropped(i)  == (bool) dropped[i]);
            if (ref.is_empty(i)) {
                continue;
            }
            assert(ref.pos_get(i)     == mod.pos_get(i));
            assert(ref.get_shift(i)   == mod.get_shift(i));
            assert(ref.seq_count(i)   == mod.seq_count(i));
            assert(ref.seq_count(i) != 1 || ref.seq_get(i) == mod.seq_get(i));
            assert(ref.ext_get(i).x   == mod.ext_get(i).x);
            assert(ref.ext_get(i).y   == mod.ext_get(i).y);
            assert(ref.ext_get(i).tok == mod.ext_get(i).tok);
        }

        for (const llama_seq_id s : SEQS) {
            assert(ref.seq_pos_min(s) == mod.seq_pos_min(s));
            assert(ref.seq_pos_max(s) == mod.seq_pos_max(s));

            const auto & a = ref.seq_pos_get(s);
            const auto   b = mod.seq_pos_get(s);
            assert(a.size() == b.size() && a.empty() == b.empty());
            assert(std::equal(a.begin(), a.end(), b.begin()));

            for (const llama_pos p : { 0, 10, 100, 500 }) {
                const auto it_a = a.lower_bound({ p, 0 });
                const auto it_b = b.lower_bound({ p, 0 });
                assert((it_a == a.end()) == (it_b == b.end()));
                assert(it_a == a.end()   || (it_a->first == it_b->first && it_a->second == it_b->second));
                assert(it_a == a.begin() || *std::prev(it_a) == *std::prev(it_b));
                const auto key = it_a == a.end() ? std::pair(p, 0u) : *it_a;
                assert((a.upper_bound(key) == a.end()) == (b.upper_bound(key) == b.end()));
                assert(a.upper_bound(key) == a.end() || *a.upper_bound(key) == *b.upper_bound(key));
                assert(ref.seq_pos_tok_le(s, p) == mod.seq_pos_tok_le(s, p));
            }
        }
    }
};

int main(int argc, char ** argv) {
    const int      n    = argc > 1 ? atoi(argv[1]) : 100000;
    const uint32_t seed = argc > 2 ? atoi(argv[2]) : 1;

    pair_of_cells cells(seed);
    for (int i = 0; i < n; ++i) {
        cells.step();
        if (i % 10 == 0 || i < 100) {
            cells.check();
        }
    }
    cells.check();

    // a cache that keeps no tokens keeps the rest
    llama_mod_cells cells_own;
    cells_own.resize(8);
    cells_own.keep_tokens(false);
    cells_own.pos_set(3, 5);
    llama_kv_cell_ext ext;
    ext.x   = 2;
    ext.tok = 7;
    cells_own.ext_set(3, ext);
    assert(cells_own.ext_get(3).tok == LLAMA_TOKEN_NULL && cells_own.ext_get(3).x == 2);

    // each of many cells has another set of sequences: they have numbers of more than 16 bits
    const uint32_t n_sets = 70000;
    llama_mod_cells cells_many;
    cells_many.resize(n_sets);
    for (uint32_t i = 0; i < n_sets; ++i) {
        cells_many.pos_set(i, i);
        for (llama_seq_id s = 0; s < 17; ++s) {
            if ((i + 1) >> s & 1) {
                cells_many.seq_add(i, s);
            }
        }
    }
    for (uint32_t i = 0; i < n_sets; ++i) {
        assert(cells_many.seq_get_all(i) == llama_mod_cells::seq_set_t(i + 1));
    }

    printf("%d operations: OK\n", n);
    return 0;
}
