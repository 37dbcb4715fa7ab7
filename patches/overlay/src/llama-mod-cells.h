#pragma once

#include "llama-kv-cells.h"

#include <algorithm>
#include <array>
#include <deque>
#include <iterator>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

// One value for each cell. Cells from the last one written on have the value `none` and take no memory.
template <typename T>
class llama_mod_column {
public:
    explicit llama_mod_column(T none) : none(none) {}

    T get(uint32_t i) const {
        return i < data.size() ? data[i] : none;
    }

    void set(uint32_t i, T value) {
        if (i >= data.size()) {
            if (value == none) {
                return;
            }
            if (i >= data.capacity()) {
                data.reserve(i + i/8 + 64);
            }
            data.resize(i + 1, none);
        }
        data[i] = value;
    }

    // the cells from n on have the value none
    void truncate(uint32_t n) {
        if (n < data.size()) {
            data.resize(n);
            data.shrink_to_fit();
        }
    }

    uint32_t size() const {
        return data.size();
    }

private:
    T              none;
    std::vector<T> data;
};

// What llama_kv_cells tells of the cells of a K/V cache, in about 11 bytes for each cell in use (llama_kv_cells: about
// 200 for each cell of the context). The methods do the same; those that nobody calls are left out.
// A cell holds its position and the number of its set of sequences: few sets differ. Each sequence has a list of its
// cells in the order of their positions. Tokens, places in two dimensions, shifts and flags take memory where there are any.
class llama_mod_cells {
public:
    using seq_set_t = llama_kv_cells::seq_set_t;
    using list      = std::deque<uint32_t>; // of cells

    void reset() {
        truncate(0);

        n_used    = 0;
        n_max     = 0;
        has_shift = false;

        sets.assign(1, {});
        set_ids.clear();
        free_ids.clear();
        order.clear();
    }

    void reset_shift() {
        has_shift = false;
        shift.truncate(0);
    }

    uint32_t size() const {
        return n_cells;
    }

    void resize(uint32_t n) {
        n_cells = n;
        reset();
    }

    // false: the caches' tokens are forgotten. only models with n-gram embeddings read them (seq_pos_tok_le)
    void keep_tokens(bool value) {
        has_tokens = value;
    }

    bool is_empty(uint32_t i) const {
        assert(i < n_cells);

        return pos.get(i) == -1;
    }

    uint32_t get_used() const {
        return n_used;
    }

    // the index of the last cell that is used + 1
    // return 0 if no cells are used
    uint32_t used_max_p1() const {
        return n_max;
    }

    bool get_has_shift() const {
        return has_shift;
    }

    // copy the state of cells [idxs[0], idxs[1], ..., idxs[idxs.size() - 1])
    llama_mod_cells cp(const std::vector<uint32_t> & idxs) const {
        llama_mod_cells res;

        res.has_tokens = has_tokens;
        res.resize(idxs.size());

        for (uint32_t j = 0; j < idxs.size(); ++j) {
            res.copy_cell(j, *this, idxs[j]);
        }

        return res;
    }

    // set the state of cells [idxs[0], idxs[1], ..., idxs[idxs.size() - 1])
    void set(const std::vector<uint32_t> & idxs, const llama_mod_cells & other) {
        assert(idxs.size() == other.size());

        for (uint32_t j = 0; j < idxs.size(); ++j) {
            if (!is_empty(idxs[j])) {
                rm(idxs[j]);
            }
            copy_cell(idxs[j], other, j);
        }
    }

    // move a non-empty cell to an empty one
    void mv(uint32_t src, uint32_t dst) {
        assert(!is_empty(src));
        assert(is_empty(dst));

        const llama_pos p = pos.get(src);

        for_bits(seq_get_all(src), [&](llama_seq_id s) { list_mv(order.at(s), src, p, dst); });

        n_used++;
        n_max = std::max(n_max, dst + 1);

        pos    .set(dst, p);
        set_seq(dst, seq_id_of(src));
        tok    .set(dst, tok    .get(src));
        xy     .set(dst, xy     .get(src));
        shift  .set(dst, shift  .get(src));
        dropped.set(dst, dropped.get(src));

        set_seq(src, 0);
        forget(src);
    }

    // clear a non-empty cell
    void rm(uint32_t i) {
        assert(!is_empty(i));

        seqs_set(i, {});
        forget(i);
    }

    // note: call only if the cell has seq_id
    // return true if the cell becomes empty
    bool seq_rm(uint32_t i, llama_seq_id seq_id) {
        assert(!is_empty(i));
        assert(seq_has(i, seq_id));

        seqs_set(i, seq_set_t(seq_get_all(i)).reset(seq_id));

        if (seq_id_of(i) == 0) {
            forget(i);

            return true;
        }

        return false;
    }

    // return true if the cell becomes empty (i.e. it did not contain seq_id before the call)
    bool seq_keep(uint32_t i, llama_seq_id seq_id) {
        assert(i < n_cells);

        if (seq_has(i, seq_id)) {
            seqs_set(i, seq_set_t().set(seq_id));

            return false;
        }

        if (seq_id_of(i) != 0) {
            rm(i);

            return true;
        }

        assert(is_empty(i));

        return false;
    }

    // number of different sequences in the cell
    int seq_count(uint32_t i) const {
        assert(!is_empty(i));

        return sets[seq_id_of(i)].n_seq;
    }

    // the full set of sequences this cell is visible to, valid until the next change
    const seq_set_t & seq_get_all(uint32_t i) const {
        assert(i < n_cells);

        return sets[seq_id_of(i)].bits;
    }

    // check if the cell contains seq_id
    bool seq_has(uint32_t i, llama_seq_id seq_id) const {
        assert(seq_id >= 0);

        return seq_get_all(i).test(seq_id);
    }

    // the (pos, cell) pairs of a sequence, ordered by position and then by cell; valid until the next change
    class seq_view {
    public:
        using value_type = std::pair<llama_pos, uint32_t>;

        class iterator {
        public:
            using iterator_category = std::bidirectional_iterator_tag;
            using value_type        = seq_view::value_type;
            using difference_type   = std::ptrdiff_t;
            using reference         = value_type;

            struct pointer {
                value_type value;

                const value_type * operator->() const { return &value; }
            };

            iterator(const llama_mod_cells * cells, list::const_iterator it) : cells(cells), it(it) {}

            value_type operator* () const { return { cells->pos.get(*it), *it }; }
            pointer    operator->() const { return { **this }; }

            iterator & operator++() { ++it; return *this; }
            iterator & operator--() { --it; return *this; }

            bool operator==(const iterator & other) const { return it == other.it; }
            bool operator!=(const iterator & other) const { return it != other.it; }

        private:
            const llama_mod_cells *              cells;
            list::const_iterator it;
        };

        seq_view(const llama_mod_cells * cells, const list * idxs) : cells(cells), idxs(idxs) {}

        iterator begin() const { return { cells, idxs->begin() }; }
        iterator end()   const { return { cells, idxs->end() }; }

        bool   empty() const { return idxs->empty(); }
        size_t size()  const { return idxs->size(); }

        // the first pair that is not smaller
        iterator lower_bound(const value_type & key) const { return { cells, cells->find(*idxs, key) }; }

        // the first pair that is larger
        iterator upper_bound(const value_type & key) const {
            const auto it = lower_bound(key);
            return it != end() && *it == key ? std::next(it) : it;
        }

    private:
        const llama_mod_cells *      cells;
        const list * idxs;
    };

    seq_view seq_pos_get(llama_seq_id seq_id) const {
        assert(seq_id >= 0);
        assert(seq_id < LLAMA_MAX_SEQ);

        static const list none;

        const auto it = order.find(seq_id);
        return { this, it == order.end() ? &none : &it->second };
    }

    // the token of the cell of sequence seq_id at the largest position <= p
    // when several cells share that position, the one with the highest index wins
    // return LLAMA_TOKEN_NULL if the sequence has no cell at or before p
    llama_token seq_pos_tok_le(llama_seq_id seq_id, llama_pos p) const {
        const auto sp = seq_pos_get(seq_id);
        const auto it = sp.upper_bound({ p, std::numeric_limits<uint32_t>::max() });

        return it == sp.begin() ? LLAMA_TOKEN_NULL : tok.get(std::prev(it)->second);
    }

    // note: call only if the cell is not empty and the seq_id is not in the cell
    void seq_add(uint32_t i, llama_seq_id seq_id) {
        assert(!is_empty(i));
        assert(!seq_has(i, seq_id));

        seqs_set(i, seq_set_t(seq_get_all(i)).set(seq_id));
    }

    // return the sequence id of this cell
    // note: call only for cells with exactly one sequence
    llama_seq_id seq_get(uint32_t i) const {
        assert(seq_count(i) == 1);

        return sets[seq_id_of(i)].first;
    }

    // the minimum position of sequence seq_id currently present in any of the cells
    // return -1 if the sequence is not present
    llama_pos seq_pos_min(llama_seq_id seq_id) const {
        const auto sp = seq_pos_get(seq_id);

        return sp.empty() ? -1 : sp.begin()->first;
    }

    // the maximum position of sequence seq_id currently present in any of the cells
    // return -1 if the sequence is not present
    llama_pos seq_pos_max(llama_seq_id seq_id) const {
        const auto sp = seq_pos_get(seq_id);

        return sp.empty() ? -1 : std::prev(sp.end())->first;
    }

    // note: call only if the cell is not empty
    llama_pos pos_get(uint32_t i) const {
        assert(!is_empty(i));

        return pos.get(i);
    }

    llama_kv_cell_ext ext_get(uint32_t i) const {
        assert(!is_empty(i));

        llama_kv_cell_ext res;
        res.x   = xy.get(i)[0];
        res.y   = xy.get(i)[1];
        res.tok = tok.get(i);
        return res;
    }

    // note: call only if the cell is not empty
    llama_pos get_shift(uint32_t i) const {
        assert(!is_empty(i));

        return shift.get(i);
    }

    // check if a cell is not empty and its position is within [p0, p1)
    bool pos_in(uint32_t i, llama_pos p0, llama_pos p1) const {
        assert(i < n_cells);

        const llama_pos p = pos.get(i);
        return p >= p0 && p < p1;
    }

    // set the position of an empty cell
    // does not modify "has_shift"
    // note: call only if the cell is empty
    void pos_set(uint32_t i, llama_pos p) {
        assert(is_empty(i));
        assert(seq_id_of(i) == 0);

        pos.set(i, p);

        n_used++;
        n_max = std::max(n_max, i + 1);
    }

    void ext_set(uint32_t i, llama_kv_cell_ext p) {
        assert(!is_empty(i));

        xy.set(i, { p.x, p.y });
        if (has_tokens) {
            tok.set(i, p.tok);
        }
    }

    // pos[i] = pos[i] + d
    // sets "has_shift" to true
    // note: call only if the cell is not empty
    // return true if the cell becomes empty
    bool pos_add(uint32_t i, llama_pos d) {
        assert(!is_empty(i));

        const llama_pos p = pos.get(i) + d;

        has_shift = true;

        if (p < 0) {
            rm(i);

            return true;
        }

        shift.set(i, shift.get(i) + d);
        pos_move(i, p);

        return false;
    }

    // pos[i] = pos[i] / d
    // sets "has_shift" to true
    // note: call only if the cell is not empty
    void pos_div(uint32_t i, int d) {
        assert(!is_empty(i));

        const llama_pos p_old = pos.get(i);
        const llama_pos p     = p_old/d;

        has_shift = true;

        shift.set(i, shift.get(i) + p_old - p);
        pos_move(i, p);
    }

    // what llama_kv_cells does not have: a kv unit has dropped the cell's token, which is visible in a window only
    bool is_dropped(uint32_t i) const {
        assert(i < n_cells);

        return dropped.get(i);
    }

    // note: call only if the cell is not empty
    void set_dropped(uint32_t i, bool value) {
        assert(!is_empty(i));

        dropped.set(i, value);
    }

private:
    struct seq_set {
        seq_set_t    bits;
        int          n_seq   = 0;
        llama_seq_id first   = -1;
        uint32_t     n_cells = 0; // that have this set
    };

    uint32_t n_cells = 0;
    uint32_t n_used  = 0;
    uint32_t n_max   = 0; // used_max_p1()

    bool has_shift  = false;
    bool has_tokens = true;

    llama_mod_column<llama_pos>                pos     { -1 };
    llama_mod_column<uint16_t>                 seq     { 0 }; // -> sets
    llama_mod_column<uint16_t>                 seq_hi  { 0 }; // the upper bits, where there are more sets
    llama_mod_column<llama_token>              tok     { LLAMA_TOKEN_NULL };
    llama_mod_column<std::array<llama_pos, 2>> xy      { { 0, 0 } };
    llama_mod_column<llama_pos>                shift   { 0 };
    llama_mod_column<uint8_t>                  dropped { 0 };

    std::vector<seq_set>                    sets { 1 }; // the first one is empty
    std::unordered_map<seq_set_t, uint32_t> set_ids;
    std::vector<uint32_t>                   free_ids;

    // the cells of each sequence that has any, by position and then by index
    std::map<llama_seq_id, list> order;

    void truncate(uint32_t n) {
        pos    .truncate(n);
        seq    .truncate(n);
        seq_hi .truncate(n);
        tok    .truncate(n);
        xy     .truncate(n);
        shift  .truncate(n);
        dropped.truncate(n);
    }

    // the cell of no sequence becomes empty
    void forget(uint32_t i) {
        assert(seq_id_of(i) == 0);

        pos    .set(i, -1);
        tok    .set(i, LLAMA_TOKEN_NULL);
        xy     .set(i, { 0, 0 });
        shift  .set(i, 0);
        dropped.set(i, 0);

        n_used--;
        while (n_max > 0 && pos.get(n_max - 1) == -1) {
            n_max--;
        }
        if (pos.size() > n_max + n_max/4 + 256) {
            truncate(n_max);
        }
    }

    // cell i is empty, and becomes what cell j of the other ones is
    void copy_cell(uint32_t i, const llama_mod_cells & other, uint32_t j) {
        if (other.is_empty(j)) {
            return;
        }
        assert(other.shift.get(j) == 0);

        pos_set(i, other.pos.get(j));
        ext_set(i, other.ext_get(j));
        set_dropped(i, other.is_dropped(j));
        seqs_set(i, other.seq_get_all(j));
    }

    //
    // sets of sequences
    //

    // the number of the cell's set
    uint32_t seq_id_of(uint32_t i) const {
        return seq.get(i) | (uint32_t) seq_hi.get(i) << 16;
    }

    void set_seq(uint32_t i, uint32_t id) {
        seq   .set(i, id & UINT16_MAX);
        seq_hi.set(i, id >> 16);
    }

    uint32_t set_id(const seq_set_t & bits) {
        if (const auto it = set_ids.find(bits); it != set_ids.end()) {
            return it->second;
        }

        uint32_t id = sets.size();
        if (!free_ids.empty()) {
            id = free_ids.back();
            free_ids.pop_back();
        } else {
            sets.emplace_back();
        }

        auto & set = sets[id];
        set.bits  = bits;
        set.n_seq = bits.count();
        for (set.first = 0; !bits.test(set.first); ++set.first) {}
        set_ids.emplace(bits, id);

        return id;
    }

    // the sequences of a cell whose position is set, and with them the lists
    void seqs_set(uint32_t i, const seq_set_t & bits) {
        const uint32_t id_old = seq_id_of(i);
        const uint32_t id     = bits.none() ? 0 : set_id(bits);
        if (id == id_old) {
            return;
        }

        for_bits(sets[id_old].bits & ~bits, [&](llama_seq_id s) { list_rm (s, i); });
        for_bits(bits & ~sets[id_old].bits, [&](llama_seq_id s) { list_add(s, i); });

        set_seq(i, id);
        sets[id].n_cells++;
        if (--sets[id_old].n_cells == 0 && id_old != 0) {
            set_ids.erase(sets[id_old].bits);
            free_ids.push_back(id_old);
        }
    }

    template <typename F> static void for_bits(const seq_set_t & bits, F f) {
        for (llama_seq_id s = 0, n = bits.count(); n > 0; ++s) {
            if (bits.test(s)) {
                f(s);
                --n;
            }
        }
    }

    //
    // lists of cells
    //

    list::const_iterator find(const list & cells, const std::pair<llama_pos, uint32_t> & key) const {
        return std::lower_bound(cells.begin(), cells.end(), key,
                [this](uint32_t i, const auto & key) { return std::pair(pos.get(i), i) < key; });
    }

    void list_add(llama_seq_id s, uint32_t i) {
        auto & cells = order[s];

        const auto key = std::pair(pos.get(i), i);
        if (cells.empty() || std::pair(pos.get(cells.back()), cells.back()) < key) {
            cells.push_back(i); // nearly always
        } else {
            cells.insert(find(cells, key), i);
        }
    }

    void list_rm(llama_seq_id s, uint32_t i) {
        auto & cells = order[s];

        cells.erase(find(cells, { pos.get(i), i }));
        if (cells.empty()) {
            order.erase(s);
        }
    }

    // cell i of the list becomes cell j at position p. those that it passes move by one place, mostly none
    void list_mv(list & cells, uint32_t i, llama_pos p, uint32_t j) const {
        const auto key = [this](uint32_t i) { return std::pair(pos.get(i), i); };
        const auto own = std::pair(p, j);

        auto it = cells.begin() + (find(cells, key(i)) - cells.begin());
        for (; it != cells.begin() && own < key(*std::prev(it)); --it) {
            *it = *std::prev(it);
        }
        for (; std::next(it) != cells.end() && key(*std::next(it)) < own; ++it) {
            *it = *std::next(it);
        }
        *it = j;
    }

    void pos_move(uint32_t i, llama_pos p) {
        for_bits(seq_get_all(i), [&](llama_seq_id s) { list_mv(order.at(s), i, p, i); });
        pos.set(i, p);
    }
};
