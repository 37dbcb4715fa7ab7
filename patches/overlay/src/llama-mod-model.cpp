#include "llama-mod-model.h"

#include "llama-impl.h"
#include "llama-mod-arch.h"
#include "llama-mod-origin.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

static const char * const MOD_KIND_NAMES[] = { "block", "attn", "ffn", "kv" };

const char * llama_mod_kind_name(llama_mod_kind kind) {
    return MOD_KIND_NAMES[kind];
}

// the order in which the units of a layer decide
static const llama_mod_kind MOD_KIND_ORDER[] = {
    LLAMA_MOD_KIND_KV, LLAMA_MOD_KIND_BLOCK, LLAMA_MOD_KIND_ATTN, LLAMA_MOD_KIND_FFN,
};

bool llama_mod_model::has_cells(int32_t il) const {
    return find(il, LLAMA_MOD_KIND_BLOCK) >= 0 || find(il, LLAMA_MOD_KIND_ATTN) >= 0 || find(il, LLAMA_MOD_KIND_KV) >= 0;
}

int32_t llama_mod_model::pos(int32_t u) const {
    return 2*units[u].layer + (units[u].kind == LLAMA_MOD_KIND_FFN ? 1 : 0);
}

int32_t llama_mod_model::first(int32_t t) const {
    int32_t u = 0;
    while (u < (int32_t) units.size() && pos(u) < t) {
        ++u;
    }

    return u;
}

namespace {

// typed access to the keys {arch}.mod.*
struct mod_keys {
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

    // one value per layer, each in [0, 1), or in [0, 1] with closed
    std::vector<float> per_layer(const std::string & name, size_t n_layer, bool closed) const {
        const int64_t id = find(name, GGUF_TYPE_ARRAY, GGUF_TYPE_FLOAT32);
        if (gguf_get_arr_n(ctx, id) != n_layer) {
            throw std::runtime_error(format("mod: key '%s%s' has %zu values, expected one for each of the %zu layers",
                    prefix.c_str(), name.c_str(), (size_t) gguf_get_arr_n(ctx, id), n_layer));
        }
        const float * data = (const float *) gguf_get_arr_data(ctx, id);
        for (size_t il = 0; il < n_layer; ++il) {
            if (!(data[il] >= 0.0f && (closed ? data[il] <= 1.0f : data[il] < 1.0f))) {
                throw std::runtime_error(format("mod: key '%s%s' has the value %g at layer %zu, outside [0, 1%s",
                        prefix.c_str(), name.c_str(), data[il], il, closed ? "]" : ")"));
            }
        }
        return { data, data + n_layer };
    }
};

} // namespace

static void mod_load_units(llama_mod_model & mod, const mod_keys & keys, int32_t n_layer) {
    std::vector<float> threshold [4];
    std::vector<float> activation[4];

    for (int k = 0; k < 4; ++k) {
        const std::string kind = MOD_KIND_NAMES[k];
        if (keys.has(kind + ".threshold")) {
            threshold [k] = keys.per_layer(kind + ".threshold",  n_layer, false);
            activation[k] = keys.per_layer(kind + ".activation", n_layer, true);
        }
    }

    mod.by_layer.assign(n_layer, { -1, -1, -1, -1 });

    for (int32_t il = 0; il < n_layer; ++il) {
        for (const llama_mod_kind kind : MOD_KIND_ORDER) {
            if (!threshold[kind].empty() && threshold[kind][il] > 0.0f) {
                mod.by_layer[il][kind] = mod.units.size();
                mod.units.push_back({ il, kind, threshold[kind][il], activation[kind][il] });
            }
        }
        if (mod.find(il, LLAMA_MOD_KIND_BLOCK) >= 0 &&
           (mod.find(il, LLAMA_MOD_KIND_ATTN)  >= 0 || mod.find(il, LLAMA_MOD_KIND_FFN) >= 0)) {
            throw std::runtime_error(format("mod: layer %d has a block router beside an attn or ffn router (key '%sblock.threshold')",
                    il, keys.prefix.c_str()));
        }
    }

    if (mod.units.empty()) {
        throw std::runtime_error(format("mod: the keys '%s*' route no unit", keys.prefix.c_str()));
    }

    bool complete = false;
    for (int32_t il = 0; il < n_layer; ++il) {
        complete = complete || !mod.has_cells(il);
    }
    if (!complete) {
        throw std::runtime_error(format("mod: no layer keeps complete K/V: at least one must have no block, attn or kv threshold (keys '%s*.threshold')",
                keys.prefix.c_str()));
    }
}

static const ggml_tensor * mod_tensor(const llama_model_loader & ml, const std::string & name, int64_t ne) {
    const auto * w = ml.get_weight(name.c_str());
    if (!w) {
        throw std::runtime_error(format("mod: tensor '%s' is missing", name.c_str()));
    }
    if (w->tensor->type != GGML_TYPE_F32 || w->tensor->ne[0] != ne || ggml_nelements(w->tensor) != ne) {
        throw std::runtime_error(format("mod: tensor '%s' has the wrong shape or type: %s %s, expected F32 [%lld]", name.c_str(),
                ggml_type_name(w->tensor->type), llama_format_tensor_shape(w->tensor).c_str(), (long long) ne));
    }
    return w->tensor;
}

static void mod_load_router(llama_model_loader & ml, const std::string & name, int64_t ne, float * dst) {
    const ggml_tensor * t = mod_tensor(ml, name, ne);

    ml.n_created++;
    ml.size_done += ggml_nbytes(t);

    if (ml.no_alloc) {
        return;
    }

    const auto & w = ml.require_weight(name.c_str());
    if (w.idx >= ml.files.size()) {
        throw std::runtime_error("mod: routers can only be read from a file");
    }
    ml.files[w.idx]->seek(w.offs, SEEK_SET);
    ml.files[w.idx]->read_raw(dst, ggml_nbytes(t));

    for (int64_t i = 0; i < ne; ++i) {
        if (!std::isfinite(dst[i])) {
            throw std::runtime_error(format("mod: tensor '%s' holds a value that is not finite", name.c_str()));
        }
    }
}

// every router tensor of the file must belong to a unit
static void mod_check_tensors(const llama_mod_model * mod, const llama_model_loader & ml, const std::string & prefix) {
    for (const auto & [name, w] : ml.weights_map) {
        int  il = -1;
        char kind[16] = { 0 };
        if (sscanf(name.c_str(), "blk.%d.mod_%15[a-z].", &il, kind) != 2) {
            continue;
        }
        bool routed = false;
        for (int k = 0; mod && k < 4; ++k) {
            routed = routed || (kind == std::string(MOD_KIND_NAMES[k]) && mod->find(il, (llama_mod_kind) k) >= 0);
        }
        if (!routed) {
            throw std::runtime_error(format("mod: tensor '%s' has no threshold in the keys '%s*'", name.c_str(), prefix.c_str()));
        }
    }
}

// bytes in the middle of each tensor that tell models of the same shape apart
static constexpr size_t MOD_N_SAMPLE = 256;

static void mod_add_keys(llama_mod_digest & digest, const llama_model_loader & ml) {
    const std::string prefix = ml.get_arch_name() + ".";

    for (int64_t id = 0; id < gguf_get_n_kv(ml.metadata); ++id) {
        const std::string key = gguf_get_key(ml.metadata, id);
        if (key.compare(0, prefix.size(), prefix) != 0) {
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

static uint64_t mod_get_digest(const llama_mod_model & mod, llama_model_loader & ml) {
    llama_mod_digest digest;

    mod_add_keys(digest, ml);

    for (const auto & [name, w] : ml.weights_map) {
        digest.add(name);
        digest.add((int32_t) w.tensor->type);
        digest.add(w.tensor->ne, sizeof(w.tensor->ne));

        if (ml.no_alloc || w.idx >= ml.files.size()) {
            continue;
        }
        const size_t size = ggml_nbytes(w.tensor);
        uint8_t sample[MOD_N_SAMPLE];
        const size_t n = std::min(size, MOD_N_SAMPLE);
        ml.files[w.idx]->seek(w.offs + (size - n)/2, SEEK_SET);
        ml.files[w.idx]->read_raw(sample, n);
        digest.add(sample, n);
    }

    digest.add(mod.w.data(), mod.w.size()*sizeof(float));
    digest.add(mod.b.data(), mod.b.size()*sizeof(float));

    return digest.value;
}

std::unique_ptr<llama_mod_model> llama_mod_model_load(const llama_model & model, llama_model_loader & ml) {
    const mod_keys keys = { ml.metadata, ml.get_arch_name() + ".mod." };

    if (!keys.has("version")) {
        mod_check_tensors(nullptr, ml, keys.prefix);
        return nullptr;
    }

    if (const uint32_t version = keys.u32("version"); version != 1) {
        throw std::runtime_error(format("mod: key '%sversion' is %u, this build reads version 1", keys.prefix.c_str(), version));
    }
    if (const std::string func = keys.str("gating_func"); func != "sigmoid") {
        throw std::runtime_error(format("mod: key '%sgating_func' is '%s', this build knows 'sigmoid'", keys.prefix.c_str(), func.c_str()));
    }
    if (const std::string why = llama_mod_arch_refuses(model); !why.empty()) {
        throw std::runtime_error(format("mod: architecture '%s' cannot have routers: %s", ml.get_arch_name().c_str(), why.c_str()));
    }

    auto mod = std::make_unique<llama_mod_model>();

    mod->scale_output = keys.flag("scale_output");
    mod->n_sink       = std::min<uint32_t>(keys.u32("sink_tokens"), INT32_MAX);

    mod_load_units(*mod, keys, model.hparams.n_layer());

    if (keys.has("kv.threshold")) {
        mod->kv_window = keys.u32("kv_window");
        if (mod->kv_window == 0 || mod->kv_window > INT32_MAX/4) {
            throw std::runtime_error(format("mod: key '%skv_window' is %u, it must be from 1 to %d", keys.prefix.c_str(), mod->kv_window, INT32_MAX/4));
        }
    }

    for (const auto & u : mod->units) {
        if (const std::string why = llama_mod_arch_refuses(model, u.layer, u.kind); !why.empty()) {
            throw std::runtime_error(format("mod: layer %d of architecture '%s' cannot have a router for '%s': %s", u.layer,
                    ml.get_arch_name().c_str(), MOD_KIND_NAMES[u.kind], why.c_str()));
        }
    }

    mod_check_tensors(mod.get(), ml, keys.prefix);

    const int64_t n_embd = model.hparams.n_embd;
    mod->w.resize(mod->units.size()*n_embd);
    mod->b.resize(mod->units.size());
    for (size_t u = 0; u < mod->units.size(); ++u) {
        const std::string name = format("blk.%d.mod_%s.", mod->units[u].layer, MOD_KIND_NAMES[mod->units[u].kind]);
        mod_load_router(ml, name + "weight", n_embd, mod->w.data() + u*n_embd);
        mod_load_router(ml, name + "bias",   1,      mod->b.data() + u);
    }

    mod->digest = mod_get_digest(*mod, ml);

    LLAMA_LOG_INFO("%s: %zu routed units, kv_window = %u, sink tokens = %u, scale_output = %d\n", __func__,
            mod->units.size(), mod->kv_window, mod->n_sink, mod->scale_output);

    return mod;
}
