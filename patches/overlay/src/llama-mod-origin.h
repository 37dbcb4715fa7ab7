#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;

// 64-bit FNV-1a
struct llama_mod_digest {
    uint64_t value = 0xcbf29ce484222325;

    void add(const void * data, size_t size);

    template <typename T> void add(const T & x) { add(&x, sizeof(x)); } // T without padding

    void add(const std::string & s); // and its end
};

// what the K/V of a sequence are computed with. The K/V of a saved state are those that a context would compute from
// the same tokens only where all of this is the same
struct llama_mod_origin {
    uint64_t model    = 0; // digest of the file
    uint64_t rope     = 0; // digest of the context's RoPE
    uint64_t adapters = 0; // digest of the LoRA adapters and the control vector

    int32_t  type_k  = 0;
    int32_t  type_v  = 0;
    uint32_t v_trans = 0;

    int32_t            force = 0; // llama_mod_force
    float              shift = 0.0f; // 0 where a force decides
    std::vector<float> thresholds;   // [n_units], empty where a force decides

    bool mixed = false; // this holds for some of the sequence's tokens only

    // what the user has to know where `now`, of a context, does not go on with K/V of this origin; else empty
    std::string difference(const llama_mod_origin & now) const;

    void write(llama_io_write_i & io) const;
    void read (llama_io_read_i  & io); // throws std::runtime_error
};
