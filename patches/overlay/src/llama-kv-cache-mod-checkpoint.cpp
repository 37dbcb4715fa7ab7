#include "llama-kv-cache-mod.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>

// A checkpoint holds what of a sequence the memory will have given back when more tokens have come: the cells of dropped
// tokens that are within reach now. All other K/V of these tokens stay where they are as long as no more than the tail
// behind them is removed, so they are not written. Recurrent states are written. Hence a checkpoint's size depends on
// windows, rollback and states, not on the length of the text.

//
// what it says
//

uint64_t llama_kv_cache_mod::digest_tokens(llama_seq_id seq_id, llama_pos p1) const {
    llama_mod_digest res;

    const auto & cells = base->get_cells(0);
    for (const auto & [p, idx] : cells.seq_pos_get(seq_id)) {
        if (p >= p1) {
            break;
        }
        const auto ext = cells.ext_get(idx);
        res.add(p);
        res.add(ext.x);
        res.add(ext.y);
        res.add(ext.tok);
    }
    res.add(seqs[seq_id].history.digest(p1));

    return res.value;
}

std::vector<uint32_t> llama_kv_cache_mod::dropped_cells(const layer_group & c, llama_seq_id seq_id) const {
    std::vector<uint32_t> res;

    const auto & cells = c.kv->get_cells(0);
    for (const auto & [p, idx] : cells.seq_pos_get(seq_id)) {
        if (cells.is_dropped(idx)) {
            res.push_back(idx);
        }
    }
    std::sort(res.begin(), res.end());

    return res;
}

//
// writing
//

void llama_kv_cache_mod::checkpoint_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    state_write_origins(io, seq_id, MOD_CHECKPOINT_MAGIC);

    const auto & s = seqs[seq_id];

    const llama_pos p_max = base->seq_pos_max(seq_id);

    const int32_t  info[]    = { p_max, s.broken, (int32_t) windows.size(), (int32_t) groups.size() };
    const uint64_t digests[] = { digest_tokens(seq_id, p_max), digest_tokens(seq_id, p_max + 1) };
    io.write(info,    sizeof(info));
    io.write(digests, sizeof(digests));
    for (const auto & left : s.left) {
        io.write(&left.freed, sizeof(left.freed));
    }

    for (const auto & c : groups) {
        if (c.drops) {
            checkpoint_write_cells(io, c, dropped_cells(c, seq_id));
        }
    }
    for (const auto & c : groups) {
        if (c.drops) {
            checkpoint_write_data(io, c, dropped_cells(c, seq_id));
        }
    }
    if (recr) {
        recr->state_write(io, seq_id);
    }
}

void llama_kv_cache_mod::checkpoint_write_cells(llama_io_write_i & io, const layer_group & c, const std::vector<uint32_t> & idxs) const {
    const auto & cells = c.kv->get_cells(0);

    const int32_t info[] = { c.il, c.part, (int32_t) idxs.size() };
    io.write(info, sizeof(info));
    for (const uint32_t idx : idxs) {
        const llama_pos pos = cells.pos_get(idx);
        const auto      ext = cells.ext_get(idx);
        io.write(&pos, sizeof(pos));
        io.write(&ext, sizeof(ext));
    }
}

void llama_kv_cache_mod::checkpoint_write_data(llama_io_write_i & io, const layer_group & c, const std::vector<uint32_t> & idxs) const {
    if (idxs.empty()) {
        return;
    }
    llama_kv_cache::cell_ranges_t ranges = { 0, {} };
    for (const uint32_t idx : idxs) {
        if (ranges.data.empty() || ranges.data.back().second != idx) {
            ranges.data.emplace_back(idx, idx);
        }
        ranges.data.back().second++;
    }
    c.kv->state_write_data(io, ranges);
}

//
// reading
//

llama_kv_cache_mod::checkpoint llama_kv_cache_mod::checkpoint_parse(llama_io_read_i & io) {
    state_read_origins(io, MOD_CHECKPOINT_MAGIC);

    checkpoint res;

    int32_t info[4];
    io.read(info, sizeof(info));
    if (info[2] != (int32_t) windows.size() || info[3] != (int32_t) groups.size()) {
        throw std::runtime_error("mod: the checkpoint belongs to a model with other routed layers");
    }
    res.pos_max = info[0];
    res.broken  = info[1] != 0;

    io.read(res.digests, sizeof(res.digests));
    res.freed.resize(windows.size());
    for (auto & freed : res.freed) {
        io.read(&freed, sizeof(freed));
        freed = std::max(-1, freed);
    }

    res.cells.resize(groups.size());
    for (size_t i = 0; i < groups.size(); ++i) {
        if (groups[i].drops) {
            checkpoint_parse_cells(io, groups[i], res.pos_max, res.cells[i]);
        }
    }
    return res;
}

void llama_kv_cache_mod::checkpoint_parse_cells(llama_io_read_i & io, const layer_group & c, llama_pos p_max, std::vector<checkpoint::cell> & res) const {
    int32_t info[3];
    io.read(info, sizeof(info));
    if (info[0] != c.il || info[1] != c.part) {
        throw std::runtime_error("mod: the checkpoint belongs to a model with other routed layers");
    }
    if (info[2] < 0 || info[2] > (int64_t) c.kv->get_cells(0).size()) {
        throw std::runtime_error("mod: the checkpoint has more cells than the context");
    }

    std::set<llama_pos> seen;
    res.resize(info[2]);
    for (auto & cell : res) {
        io.read(&cell.pos, sizeof(cell.pos));
        io.read(&cell.ext, sizeof(cell.ext));
        if (cell.pos < 0 || cell.pos > p_max || !seen.insert(cell.pos).second) {
            throw std::runtime_error("mod: the checkpoint is broken");
        }
    }
}

llama_pos llama_kv_cache_mod::checkpoint_end(const checkpoint & ckpt, llama_seq_id seq_id) {
    if (ckpt.pos_max < 0) {
        return -1;
    }

    const auto & origin_seq = seqs[seq_id].origin;
    if (origin_seq) {
        if (const auto why = origin_seq->difference(*get_origin()); !why.empty()) {
            throw std::runtime_error("mod: the sequence does not go with the checkpoint: " + why);
        }
    }

    // the last token may be another one by now: then it is left out, with all that follows. Recurrent states cannot
    // leave it out
    const bool has_all = digest_tokens(seq_id, ckpt.pos_max + 1) == ckpt.digests[1];

    const llama_pos res = has_all ? ckpt.pos_max : recr ? -1 : last_before(seq_id, ckpt.pos_max);
    if (res < 0 || (!has_all && digest_tokens(seq_id, ckpt.pos_max) != ckpt.digests[0])) {
        throw std::runtime_error("mod: the sequence does not hold the tokens of the checkpoint any more");
    }
    return res;
}

std::vector<uint32_t> llama_kv_cache_mod::leaving_cells(const layer_group & c, llama_seq_id seq_id, llama_pos end) const {
    std::vector<uint32_t> res;

    const auto & cells = c.kv->get_cells(0);
    for (const auto & [p, idx] : cells.seq_pos_get(seq_id)) {
        if (p > end || (c.drops && cells.is_dropped(idx))) {
            res.push_back(idx);
        }
    }
    return res;
}

std::vector<uint32_t> llama_kv_cache_mod::checkpoint_room(const layer_group & c, llama_seq_id seq_id, llama_pos end, size_t n) const {
    const auto & cells = c.kv->get_cells(0);

    std::set<uint32_t> emptied;
    for (const uint32_t idx : leaving_cells(c, seq_id, end)) {
        if (cells.seq_count(idx) == 1) {
            emptied.insert(idx);
        }
    }

    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < cells.size() && res.size() < n; ++i) {
        if (cells.is_empty(i) || emptied.count(i) > 0) {
            res.push_back(i);
        }
    }
    if (res.size() < n) {
        throw std::runtime_error("mod: there are too few free cells for the checkpoint");
    }
    return res;
}

void llama_kv_cache_mod::checkpoint_check(llama_io_read_i & io, llama_seq_id seq_id) {
    const auto      ckpt = checkpoint_parse(io);
    const llama_pos end  = checkpoint_end(ckpt, seq_id);
    for (size_t i = 0; i < groups.size(); ++i) {
        checkpoint_room(groups[i], seq_id, end, ckpt.cells[i].size());
    }
}

void llama_kv_cache_mod::checkpoint_read(llama_io_read_i & io, llama_seq_id seq_id) {
    // what does not fit leaves everything as it is
    const auto      ckpt = checkpoint_parse(io);
    const llama_pos end  = checkpoint_end(ckpt, seq_id);

    std::vector<std::vector<uint32_t>> rooms;
    for (size_t i = 0; i < groups.size(); ++i) {
        auto & room = rooms.emplace_back(checkpoint_room(groups[i], seq_id, end, ckpt.cells[i].size()));
        if (!room.empty() && !groups[i].rows->reserve(std::max(room.back() + 1, groups[i].kv->get_cells(0).used_max_p1()))) {
            throw std::runtime_error("mod: out of memory");
        }
    }

    try {
        checkpoint_remove(seq_id, end);
        for (size_t i = 0; i < groups.size(); ++i) {
            checkpoint_place(io, groups[i], seq_id, ckpt.cells[i], rooms[i]);
        }
        if (recr) {
            recr->state_read(io, seq_id);
        }
    } catch (...) {
        forget(seq_id);
        throw;
    }

    if (end < 0) {
        seqs[seq_id] = no_tokens();
        return;
    }
    auto & s = seqs[seq_id];
    for (size_t w = 0; w < windows.size(); ++w) {
        s.left[w].freed   = ckpt.freed[w];
        s.left[w].expired = end;
    }
    for (size_t i = 0; i < groups.size(); ++i) {
        auto & expired = s.left[groups[i].window].expired;
        for (const auto & cell : ckpt.cells[i]) {
            expired = std::min(expired, cell.pos - 1);
        }
    }
    s.broken = ckpt.broken;

    // the last token, where it is another one
    for (auto & c : groups) {
        free_cells(c, seq_id, end + 1, std::numeric_limits<llama_pos>::max(), false);
    }
}

void llama_kv_cache_mod::checkpoint_remove(llama_seq_id seq_id, llama_pos end) {
    touch_masks();
    seq_rm_one(seq_id, end + 1, std::numeric_limits<llama_pos>::max());
    for (auto & c : groups) {
        if (c.drops) {
            free_cells(c, seq_id, 0, end + 1, true);
        }
    }
    trim();
}

void llama_kv_cache_mod::checkpoint_place(llama_io_read_i & io, layer_group & c, llama_seq_id seq_id, const std::vector<checkpoint::cell> & cells_in, const std::vector<uint32_t> & idxs) {
    if (idxs.empty()) {
        return;
    }
    // what was removed may have given memory back
    if (!c.rows->reserve(std::max(idxs.back() + 1, c.kv->get_cells(0).used_max_p1()))) {
        throw std::runtime_error("mod: out of memory");
    }

    auto & cells = c.kv->v_cells[0];
    for (size_t i = 0; i < idxs.size(); ++i) {
        cells.pos_set(idxs[i], cells_in[i].pos);
        cells.ext_set(idxs[i], cells_in[i].ext);
        cells.seq_add(idxs[i], seq_id);
        cells.set_dropped(idxs[i], true);
    }
    c.head = 0;

    const llama_kv_cache::slot_info sinfo = { 0, 0, { 0 }, { idxs } };
    if (!c.kv->state_read_data(io, 0, idxs.size(), sinfo)) {
        throw std::runtime_error("mod: the checkpoint is broken");
    }
}
