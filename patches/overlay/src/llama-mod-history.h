#pragma once

#include "llama.h"

#include <cstdint>
#include <utility>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;

// What was done to a sequence besides adding tokens and taking back its tail: from some position on, its tokens were
// moved after they had been computed, or come from another sequence. Their K/V are not those that the same tokens at the
// same positions have elsewhere. Two sequences with equal tokens and an equal history have equal K/V.
class llama_mod_history {
public:
    // `what` has been done to the tokens from position p on
    void add(llama_pos p, uint64_t what);

    // the tokens from position p on are gone
    void cut(llama_pos p);

    // of what was done to the tokens below position p
    uint64_t digest(llama_pos p) const;

    void write(llama_io_write_i & io) const;
    void read (llama_io_read_i  & io); // throws std::runtime_error

private:
    std::vector<std::pair<llama_pos, uint64_t>> items; // by position, which differ
};
