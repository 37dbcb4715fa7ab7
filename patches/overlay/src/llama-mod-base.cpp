#include "llama-mod-base.h"

#include "llama-impl.h"
#include "llama-mod-origin.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

// bytes in the middle of each tensor that tell models of the same shape apart
static constexpr size_t MOD_N_SAMPLE = 256;

// the rows and columns of a matrix whose numbers are its sample, spread evenly
static constexpr int64_t MOD_SAMPLE_ROWS = 8;
static constexpr int64_t MOD_SAMPLE_COLS = 16;
static_assert(MOD_SAMPLE_ROWS*MOD_SAMPLE_COLS == LLAMA_MOD_BASE_N_SAMPLE);

bool llama_mod_parse_name(const std::string & name, int32_t & il, std::string & kind) {
    char buf[16] = { 0 };
    if (sscanf(name.c_str(), "blk.%d.mod_%15[a-z].", &il, buf) != 2) {
        return false;
    }
    kind = buf;
    return true;
}

static void mod_add_keys(llama_mod_digest & digest, const llama_model_loader & ml) {
    const std::string prefix = ml.get_arch_name() + ".";
    const std::string ours   = prefix + "mod.";

    for (int64_t id = 0; id < gguf_get_n_kv(ml.metadata); ++id) {
        const std::string key = gguf_get_key(ml.metadata, id);
        if (key.compare(0, prefix.size(), prefix) != 0 || key.compare(0, ours.size(), ours) == 0) {
            continue;
        }
        digest.add(key);
        if (gguf_get_kv_type(ml.metadata, id) == GGUF_TYPE_FLOAT32) {
            digest.add(gguf_get_val_f32(ml.metadata, id)); // as text it would be rounded
        } else {
            digest.add(gguf_kv_to_str(ml.metadata, id));
        }
    }

    const std::map<std::string, llama_model_kv_override> overrides(ml.kv_overrides.begin(), ml.kv_overrides.end());
    for (const auto & [key, value] : overrides) {
        digest.add(key);
        switch (value.tag) {
            case LLAMA_KV_OVERRIDE_TYPE_INT:   digest.add(value.val_i64);              break;
            case LLAMA_KV_OVERRIDE_TYPE_FLOAT: digest.add(value.val_f64);              break;
            case LLAMA_KV_OVERRIDE_TYPE_BOOL:  digest.add(value.val_bool);             break;
            case LLAMA_KV_OVERRIDE_TYPE_STR:   digest.add(std::string(value.val_str)); break;
        }
    }
}

static bool mod_can_read(const llama_model_loader & ml, const llama_model_loader::llama_tensor_weight & w) {
    return w.idx < ml.files.size();
}

static void mod_read(const llama_model_loader & ml, const llama_model_loader::llama_tensor_weight & w, size_t offset, void * dst, size_t size) {
    ml.files[w.idx]->seek(w.offs + offset, SEEK_SET);
    ml.files[w.idx]->read_raw(dst, size);
}

static uint64_t mod_get_digest(const llama_model_loader & ml) {
    llama_mod_digest digest;

    mod_add_keys(digest, ml);

    for (const auto & [name, w] : ml.weights_map) {
        int32_t il;
        std::string kind;
        if (llama_mod_parse_name(name, il, kind)) {
            continue;
        }
        digest.add(name);
        digest.add((int32_t) w.tensor->type);
        digest.add(w.tensor->ne, sizeof(w.tensor->ne));

        if (ml.no_alloc || !mod_can_read(ml, w)) {
            continue;
        }
        const size_t size = ggml_nbytes(w.tensor);
        uint8_t sample[MOD_N_SAMPLE];
        const size_t n = std::min(size, MOD_N_SAMPLE);
        mod_read(ml, w, (size - n)/2, sample, n);
        digest.add(sample, n);
    }
    return digest.value;
}

// index i of count ones below size, at even distances
static int64_t mod_spread(int64_t size, int64_t count, int64_t i) {
    return (2*i + 1)*size/(2*count);
}

static std::vector<float> mod_get_sample(const llama_model_loader & ml, const llama_model_loader::llama_tensor_weight & w) {
    const auto * t = w.tensor;
    const auto to_float = ggml_get_type_traits(t->type)->to_float;
    if (!mod_can_read(ml, w) || ggml_n_dims(t) != 2 || (t->type != GGML_TYPE_F32 && !to_float)) {
        return {};
    }
    std::vector<uint8_t> row(ggml_row_size(t->type, t->ne[0]));
    std::vector<float>   values(t->ne[0]);
    std::vector<float>   res;
    for (int64_t i = 0; i < MOD_SAMPLE_ROWS; ++i) {
        const size_t offset = mod_spread(t->ne[1], MOD_SAMPLE_ROWS, i)*row.size();
        if (to_float) {
            mod_read(ml, w, offset, row.data(), row.size());
            to_float(row.data(), values.data(), t->ne[0]);
        } else {
            mod_read(ml, w, offset, values.data(), row.size());
        }
        for (int64_t j = 0; j < MOD_SAMPLE_COLS; ++j) {
            res.push_back(values[mod_spread(t->ne[0], MOD_SAMPLE_COLS, j)]);
        }
    }
    return res;
}

std::shared_ptr<const llama_mod_base> llama_mod_base_load(const llama_model_loader & ml) {
    auto res = std::make_shared<llama_mod_base>();

    res->arch   = ml.get_arch_name();
    res->digest = mod_get_digest(ml);

    if (const auto * w = ml.get_weight("token_embd.weight")) {
        res->n_vocab   = w->tensor->ne[1];
        res->embedding = mod_get_sample(ml, *w);
    }
    return res;
}

float llama_mod_base_distance(const std::vector<float> & expected, const std::vector<float> & actual) {
    double difference = 0.0;
    double length     = 0.0;
    for (size_t i = 0; i < std::min(expected.size(), actual.size()); ++i) {
        difference += std::pow((double) expected[i] - actual[i], 2);
        length     += std::pow((double) expected[i], 2);
    }
    return std::sqrt(difference)/std::max(std::sqrt(length), 1e-30);
}
