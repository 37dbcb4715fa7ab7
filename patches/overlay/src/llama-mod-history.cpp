#include "llama-mod-history.h"

#include "llama-io.h"
#include "llama-mod-origin.h"

#include <stdexcept>

// more are not read, whatever a broken state says
static constexpr uint32_t MOD_MAX_ITEMS = 1 << 20;

void llama_mod_history::add(llama_pos p, uint64_t what) {
    llama_mod_digest all;
    while (!items.empty() && items.back().first >= p) {
        all.add(items.back().second);
        items.pop_back();
    }
    all.add(what);
    items.emplace_back(p, all.value);
}

void llama_mod_history::cut(llama_pos p) {
    while (!items.empty() && items.back().first >= p) {
        items.pop_back();
    }
}

uint64_t llama_mod_history::digest(llama_pos p) const {
    llama_mod_digest res;
    for (const auto & [pos, what] : items) {
        if (pos < p) {
            res.add(pos);
            res.add(what);
        }
    }
    return res.value;
}

void llama_mod_history::write(llama_io_write_i & io) const {
    const uint32_t n = items.size();
    io.write(&n, sizeof(n));
    for (const auto & [pos, what] : items) {
        io.write(&pos,  sizeof(pos));
        io.write(&what, sizeof(what));
    }
}

void llama_mod_history::read(llama_io_read_i & io) {
    uint32_t n;
    io.read(&n, sizeof(n));
    if (n > MOD_MAX_ITEMS) {
        throw std::runtime_error("mod: the state is broken");
    }
    items.resize(n);
    for (auto & [pos, what] : items) {
        io.read(&pos,  sizeof(pos));
        io.read(&what, sizeof(what));
    }
}
