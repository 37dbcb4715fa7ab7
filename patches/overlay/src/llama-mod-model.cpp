#include "llama-mod-model.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-mod-arch.h"
#include "llama-mod-base.h"
#include "llama-mod-keys.h"
#include "llama-mod-origin.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
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

int32_t llama_mod_model::n_kv(int32_t il) const {
    if (il < 0 || il >= (int32_t) kv_by_head.size()) {
        return 0;
    }
    const auto & heads = kv_by_head[il];
    return heads.size() - std::count(heads.begin(), heads.end(), -1);
}

uint32_t llama_mod_model::n_nodes() const {
    // parts store and attend for themselves
    uint32_t res = 0;
    for (int32_t il = 0; il < (int32_t) by_layer.size(); ++il) {
        res += 32*(n_parts(il) - 1);
    }
    return res;
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

void llama_mod_model::check_hidden() const {
    for (const auto & u : units) {
        if (u.kind != LLAMA_MOD_KIND_KV) {
            throw std::runtime_error(format("mod: draft heads read the hidden states of all tokens, which is possible beside kv units only, "
                    "but layer %d has a router for '%s'", u.layer, llama_mod_kind_name(u.kind)));
        }
    }
}

bool llama_mod_model_routes(const llama_model & model, const llama_cparams & cparams) {
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && cparams.ctx_other && cparams.ctx_other->get_mod()) {
        throw std::runtime_error("mod: a Gemma 4 assistant reads the K/V of its model, which a model with routers does not share");
    }
    if (!model.mod || cparams.ctx_type == LLAMA_CONTEXT_TYPE_DEFAULT) {
        return model.mod != nullptr;
    }
    model.mod->check_hidden();

    return false;
}

namespace {

static constexpr uint32_t MOD_MAX_WINDOW = INT32_MAX/4;

// K/V heads that all layers have which have any, 0: layers differ
static int32_t mod_n_head_kv(const llama_hparams & hparams) {
    int32_t res = 0;
    for (int32_t il = 0; il < (int32_t) hparams.n_layer(); ++il) {
        const int32_t n = hparams.n_head_kv(il);
        if (n != 0 && res != 0 && n != res) {
            return 0;
        }
        res = std::max(res, n);
    }
    return res;
}

} // namespace

// how many K/V heads decide apart, by the length of the keys' arrays
static int32_t mod_load_heads(const llama_mod_keys & keys, const llama_hparams & hparams, uint32_t version) {
    const size_t n_layer = hparams.n_layer();
    if (version < 2 || !keys.has("kv.threshold") || keys.count("kv.threshold") == n_layer) {
        return 1;
    }
    const int32_t n_head_kv = mod_n_head_kv(hparams);
    if (n_head_kv == 0) {
        throw std::runtime_error(format("mod: key '%skv.threshold' is for each K/V head, but the layers have different numbers of them", keys.prefix.c_str()));
    }
    return n_head_kv;
}

// the window of each kv unit; also finds the largest one
static std::vector<uint32_t> mod_load_windows(llama_mod_model & mod, const llama_mod_keys & keys, size_t n_layer, uint32_t version) {
    std::vector<uint32_t> res(n_layer*mod.n_heads, keys.u32("kv_window"));
    if (version >= 2 && keys.has("kv.window")) {
        res = keys.array<uint32_t>("kv.window", GGUF_TYPE_UINT32, n_layer, mod.n_heads);
    }
    for (const uint32_t w : res) {
        if (w == 0 || w > MOD_MAX_WINDOW) {
            throw std::runtime_error(format("mod: key '%skv_window' or '%skv.window' is %u, it must be from 1 to %u",
                    keys.prefix.c_str(), keys.prefix.c_str(), w, MOD_MAX_WINDOW));
        }
    }
    return res;
}

static void mod_load_units(llama_mod_model & mod, const llama_mod_keys & keys, const llama_hparams & hparams, uint32_t version) {
    const int32_t n_layer = hparams.n_layer();

    std::vector<float> threshold [4];
    std::vector<float> activation[4];
    std::vector<uint32_t> windows;

    mod.n_heads = mod_load_heads(keys, hparams, version);
    if (keys.has("kv.threshold")) {
        windows = mod_load_windows(mod, keys, n_layer, version);
    }

    for (int k = 0; k < 4; ++k) {
        const std::string kind = MOD_KIND_NAMES[k];
        if (keys.has(kind + ".threshold")) {
            const size_t n = k == LLAMA_MOD_KIND_KV ? mod.n_heads : 1;
            threshold [k] = keys.shares(kind + ".threshold",  n_layer, n, false);
            activation[k] = keys.shares(kind + ".activation", n_layer, n, true);
        }
    }

    mod.by_layer.assign(n_layer, { -1, -1, -1, -1 });
    mod.kv_by_head.resize(n_layer);

    for (int32_t il = 0; il < n_layer; ++il) {
        for (const llama_mod_kind kind : MOD_KIND_ORDER) {
            const bool    is_kv = kind == LLAMA_MOD_KIND_KV;
            const int32_t n     = is_kv ? mod.n_heads : 1;
            for (int32_t i = il*n; i < (il + 1)*n && !threshold[kind].empty(); ++i) {
                if (!(threshold[kind][i] > 0.0f)) {
                    continue;
                }
                if (mod.by_layer[il][kind] < 0) {
                    mod.by_layer[il][kind] = mod.units.size();
                }
                if (is_kv) {
                    mod.kv_by_head[il].resize(n, -1);
                    mod.kv_by_head[il][i - il*n] = mod.units.size();
                }
                const int32_t window = is_kv ? windows[i] : 0;
                mod.units.push_back({ il, kind, n > 1 ? i - il*n : -1, threshold[kind][i], activation[kind][i], window });
                mod.kv_window = std::max<uint32_t>(mod.kv_window, window);
            }
        }
        if (mod.find(il, LLAMA_MOD_KIND_BLOCK) >= 0 &&
           (mod.find(il, LLAMA_MOD_KIND_ATTN)  >= 0 || mod.find(il, LLAMA_MOD_KIND_FFN) >= 0)) {
            throw std::runtime_error(format("mod: layer %d has a block router beside an attn or ffn router (key '%sblock.threshold')",
                    il, keys.prefix.c_str()));
        }
    }

    const bool needs_2 = mod.n_heads > 1 || keys.has("kv.window");
    if ((version == 2) != needs_2) {
        throw std::runtime_error(format("mod: key '%sversion' is %u, but kv units %s: it must be %u", keys.prefix.c_str(), version,
                needs_2 ? "are of K/V heads or have windows of their own" : "are of layers and have one window", needs_2 ? 2 : 1));
    }
    if (const uint32_t given = mod.kv_window > 0 ? keys.u32("kv_window") : 0; given != mod.kv_window) {
        throw std::runtime_error(format("mod: key '%skv_window' is %u, the largest window of a kv unit is %u", keys.prefix.c_str(), given, mod.kv_window));
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

// n rows of ne values, one row: without the axis
static const ggml_tensor * mod_tensor(const llama_mod_source & source, const std::string & name, int64_t ne, int64_t n) {
    const auto * t = source.find(name);
    if (!t) {
        throw std::runtime_error(format("mod: tensor '%s' is missing", name.c_str()));
    }
    if (t->type != GGML_TYPE_F32 || t->ne[0] != ne || t->ne[1] != n || ggml_nelements(t) != ne*n) {
        throw std::runtime_error(format("mod: tensor '%s' has the wrong shape or type: %s %s, expected F32 [%lld%s]", name.c_str(),
                ggml_type_name(t->type), llama_format_tensor_shape(t).c_str(), (long long) ne,
                n > 1 ? format(", %lld", (long long) n).c_str() : ""));
    }
    return t;
}

// what mod_tensor() finds
static std::vector<float> mod_load_router(llama_mod_source & source, const std::string & name, int64_t ne, int64_t n) {
    const ggml_tensor * t = mod_tensor(source, name, ne, n);

    std::vector<float> res(ne*n);

    source.read(t, res.data());

    for (const float x : res) {
        if (!std::isfinite(x)) {
            throw std::runtime_error(format("mod: tensor '%s' holds a value that is not finite", name.c_str()));
        }
    }
    return res;
}

// every router tensor of the file must belong to a unit
static void mod_check_tensors(const llama_mod_model * mod, const llama_mod_source & source) {
    for (const auto & name : source.names()) {
        int32_t il;
        std::string kind;
        if (!llama_mod_parse_name(name, il, kind)) {
            continue;
        }
        bool routed = false;
        for (int k = 0; mod && k < 4; ++k) {
            routed = routed || (kind == MOD_KIND_NAMES[k] && mod->find(il, (llama_mod_kind) k) >= 0);
        }
        if (!routed) {
            throw std::runtime_error(format("mod: tensor '%s' has no threshold in the keys '%s.mod.*'", name.c_str(), source.arch.c_str()));
        }
    }
}

// what decides the K/V of a token: the model's part, and that of the routers, wherever they were read from
static uint64_t mod_get_digest(const llama_mod_model & mod, const llama_mod_base & base) {
    llama_mod_digest digest;

    digest.add(base.digest);
    digest.add(mod.scale_output);
    digest.add(mod.n_sink);
    for (const auto & u : mod.units) {
        const int32_t unit[] = { u.layer, u.kind, u.head, u.window };
        digest.add(unit, sizeof(unit));
    }
    digest.add(mod.w.data(), mod.w.size()*sizeof(float));
    digest.add(mod.b.data(), mod.b.size()*sizeof(float));

    return digest.value;
}

std::unique_ptr<llama_mod_model> llama_mod_model_read(const llama_model & model, llama_mod_source & source) {
    const llama_mod_keys keys = { source.metadata, source.arch + ".mod." };

    const uint32_t version = keys.u32("version");
    if (version != 1 && version != 2) {
        throw std::runtime_error(format("mod: key '%sversion' is %u, this build reads versions 1 and 2", keys.prefix.c_str(), version));
    }
    if (const std::string func = keys.str("gating_func"); func != "sigmoid") {
        throw std::runtime_error(format("mod: key '%sgating_func' is '%s', this build knows 'sigmoid'", keys.prefix.c_str(), func.c_str()));
    }
    if (const std::string why = llama_mod_arch_refuses(model); !why.empty()) {
        throw std::runtime_error(format("mod: architecture '%s' cannot have routers: %s", source.arch.c_str(), why.c_str()));
    }

    auto mod = std::make_unique<llama_mod_model>();

    mod->scale_output = keys.flag("scale_output");
    mod->n_sink       = std::min<uint32_t>(keys.u32("sink_tokens"), INT32_MAX);

    mod_load_units(*mod, keys, model.hparams, version);

    for (const auto & u : mod->units) {
        if (const std::string why = llama_mod_arch_refuses(model, u.layer, u.kind); !why.empty()) {
            throw std::runtime_error(format("mod: layer %d of architecture '%s' cannot have a router for '%s': %s", u.layer,
                    source.arch.c_str(), MOD_KIND_NAMES[u.kind], why.c_str()));
        }
    }

    mod_check_tensors(mod.get(), source);

    const int64_t n_embd = model.hparams.n_embd;
    mod->w.resize(mod->units.size()*n_embd);
    mod->b.resize(mod->units.size());
    for (int32_t u = 0; u < (int32_t) mod->units.size(); ++u) {
        const auto & unit = mod->units[u];
        if (mod->find(unit.layer, unit.kind) != u) {
            continue; // read with the first one
        }
        const bool    is_kv = unit.kind == LLAMA_MOD_KIND_KV;
        const int32_t n     = is_kv ? mod->n_heads : 1;

        // a bias of each row: no axis of rows
        const std::string name = format("blk.%d.mod_%s.", unit.layer, MOD_KIND_NAMES[unit.kind]);
        const auto w = mod_load_router(source, name + "weight", n_embd, n);
        const auto b = mod_load_router(source, name + "bias",   n,      1);

        for (int32_t row = 0; row < n; ++row) {
            const bool routed = !is_kv || mod->find_kv(unit.layer, row) >= 0;
            if (!routed && std::any_of(w.begin() + row*n_embd, w.begin() + (row + 1)*n_embd, [](float x) { return x != 0.0f; })) {
                throw std::runtime_error(format("mod: tensor '%sweight' has a router for K/V head %d, which has no threshold", name.c_str(), row));
            }
        }
        for (int32_t i = u; i < u + (is_kv ? mod->n_kv(unit.layer) : 1); ++i) {
            const int32_t row = std::max(mod->units[i].head, 0);
            std::copy_n(w.begin() + row*n_embd, n_embd, mod->w.begin() + i*n_embd);
            mod->b[i] = b[row];
        }
    }

    mod->digest = mod_get_digest(*mod, *model.mod_base);

    LLAMA_LOG_INFO("%s: %zu routed units, kv_window = %u, sink tokens = %u, scale_output = %d\n", __func__,
            mod->units.size(), mod->kv_window, mod->n_sink, mod->scale_output);

    return mod;
}

namespace {

// routers in the model's own file
struct mod_model_source : llama_mod_source {
    llama_model_loader & ml;

    explicit mod_model_source(llama_model_loader & ml) : llama_mod_source { ml.metadata, ml.get_arch_name() }, ml(ml) {}

    std::vector<std::string> names() const override {
        std::vector<std::string> res;
        for (const auto & it : ml.weights_map) {
            res.push_back(it.first);
        }
        return res;
    }

    const ggml_tensor * find(const std::string & name) const override {
        const auto * w = ml.get_weight(name.c_str());
        return w ? w->tensor : nullptr;
    }

    void read(const ggml_tensor * t, void * dst) override {
        ml.n_created++;
        ml.size_done += ggml_nbytes(t);

        if (ml.no_alloc) {
            return;
        }
        const auto & w = ml.require_weight(t->name);
        if (w.idx >= ml.files.size()) {
            throw std::runtime_error("mod: routers can only be read from a file");
        }
        ml.files[w.idx]->seek(w.offs, SEEK_SET);
        ml.files[w.idx]->read_raw(dst, ggml_nbytes(t));
    }
};

} // namespace

void llama_mod_model_load(llama_model & model, llama_model_loader & ml) {
    mod_model_source source(ml);

    model.mod_base = llama_mod_base_load(ml);

    if (llama_mod_keys { ml.metadata, source.arch + ".mod." }.has("version")) {
        model.mod = llama_mod_model_read(model, source);
    } else {
        mod_check_tensors(nullptr, source);
    }
}
