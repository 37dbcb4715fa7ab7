#pragma once

#include "llama-impl.h"

#include <stdexcept>
#include <string>
#include <vector>

// typed access to the keys of a file that begin with a prefix
struct llama_mod_keys {
    const gguf_context * ctx;
    const std::string prefix;

    int64_t find(const std::string & name, gguf_type type, gguf_type arr_type = GGUF_TYPE_COUNT) const {
        const std::string key = prefix + name;
        const int64_t id = gguf_find_key(ctx, key.c_str());
        if (id < 0) {
            throw std::runtime_error(format("mod: key '%s' is missing", key.c_str()));
        }
        if (gguf_get_kv_type(ctx, id) != type || (type == GGUF_TYPE_ARRAY && gguf_get_arr_type(ctx, id) != arr_type)) {
            throw std::runtime_error(format("mod: key '%s' has the wrong type, expected %s", key.c_str(),
                    gguf_type_name(type == GGUF_TYPE_ARRAY ? arr_type : type)));
        }
        return id;
    }

    bool has(const std::string & name) const {
        return gguf_find_key(ctx, (prefix + name).c_str()) >= 0;
    }

    uint32_t    u32(const std::string & name) const { return gguf_get_val_u32 (ctx, find(name, GGUF_TYPE_UINT32)); }
    bool       flag(const std::string & name) const { return gguf_get_val_bool(ctx, find(name, GGUF_TYPE_BOOL)); }
    std::string str(const std::string & name) const { return gguf_get_val_str (ctx, find(name, GGUF_TYPE_STRING)); }

    size_t count(const std::string & name, gguf_type arr_type = GGUF_TYPE_FLOAT32) const {
        return gguf_get_arr_n(ctx, find(name, GGUF_TYPE_ARRAY, arr_type));
    }

    // n values for each layer
    template <typename T> std::vector<T> array(const std::string & name, gguf_type type, size_t n_layer, size_t n) const {
        if (const size_t found = count(name, type); found != n_layer*n) {
            throw std::runtime_error(format("mod: key '%s%s' has %zu values, expected %s of the %zu layers",
                    prefix.c_str(), name.c_str(), found, n == 1 ? "one for each" : format("%zu for each", n).c_str(), n_layer));
        }
        const T * data = (const T *) gguf_get_arr_data(ctx, find(name, GGUF_TYPE_ARRAY, type));

        return { data, data + n_layer*n };
    }

    // n values for each layer, each in [0, 1), or in [0, 1] with closed
    std::vector<float> shares(const std::string & name, size_t n_layer, size_t n, bool closed) const {
        const auto res = array<float>(name, GGUF_TYPE_FLOAT32, n_layer, n);
        for (size_t i = 0; i < res.size(); ++i) {
            if (!(res[i] >= 0.0f && (closed ? res[i] <= 1.0f : res[i] < 1.0f))) {
                throw std::runtime_error(format("mod: key '%s%s' has the value %g at layer %zu, outside [0, 1%s",
                        prefix.c_str(), name.c_str(), res[i], i/n, closed ? "]" : ")"));
            }
        }
        return res;
    }
};
