#include "llama-mod.h"

#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-mod-base.h"
#include "llama-mod-keys.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <cstdlib>
#include <stdexcept>

// weights that are further apart belong to another model; nearer than the second, they are the same, rounded
static constexpr float MOD_UNRELATED_DISTANCE = 0.7f;
static constexpr float MOD_ROUNDING_DISTANCE  = 0.004f;

namespace {

// a GGUF file that holds routers and nothing else
struct mod_adapter_file {
    gguf_context_ptr metadata;
    ggml_context_ptr tensors; // without data
    llama_file       file;

    explicit mod_adapter_file(const char * path) : file(path, "rb") {
        ggml_context * ctx = nullptr;
        metadata.reset(gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ &ctx }));
        tensors.reset(ctx);
        if (!metadata) {
            throw std::runtime_error("it is no GGUF file, or damaged");
        }
    }

    std::string text(const char * key) const {
        const llama_mod_keys keys = { metadata.get(), "" };
        return keys.has(key) ? keys.str(key) : "";
    }
};

struct mod_adapter_source : llama_mod_source {
    mod_adapter_file & in;

    explicit mod_adapter_source(mod_adapter_file & in) : llama_mod_source { in.metadata.get(), in.text("general.architecture") }, in(in) {}

    std::vector<std::string> names() const override {
        std::vector<std::string> res;
        for (int64_t i = 0; i < gguf_get_n_tensors(metadata); ++i) {
            res.push_back(gguf_get_tensor_name(metadata, i));
        }
        return res;
    }

    const ggml_tensor * find(const std::string & name) const override {
        return ggml_get_tensor(in.tensors.get(), name.c_str());
    }

    void read(const ggml_tensor * t, void * dst) override {
        const size_t offset = gguf_get_data_offset(metadata) + gguf_get_tensor_offset(metadata, gguf_find_tensor(metadata, t->name));
        if (offset > in.file.size() || ggml_nbytes(t) > in.file.size() - offset) {
            throw std::runtime_error(format("mod: the data of tensor '%s' is missing", t->name));
        }
        in.file.seek(offset, SEEK_SET);
        in.file.read_raw(dst, ggml_nbytes(t));
    }
};

} // namespace

static void mod_check_state(const llama_model & model) {
    if (model.mod) {
        throw std::runtime_error("the model has routers already");
    }
    if (!model.mod_base) {
        throw std::runtime_error("the model was loaded without its weights");
    }
    if (model.mod_base.use_count() > 1) {
        throw std::runtime_error("the model has a context already, and routers come before it");
    }
}

static void mod_check_type(const mod_adapter_file & in) {
    const std::string general = in.text("general.type");
    const std::string type    = in.text("adapter.type");
    if (general != "adapter" || type != "mod") {
        throw std::runtime_error(format("it holds no routers to be put beside a model: general.type is '%s' and adapter.type is '%s', expected 'adapter' and 'mod'",
                general.c_str(), type.c_str()));
    }
}

// the routers must have been made for the model
static void mod_check_base(const llama_model & model, const mod_adapter_source & source) {
    const auto & base = *model.mod_base;
    const llama_mod_keys keys  = { source.metadata, source.arch + "." };
    const llama_mod_keys about = { source.metadata, "adapter.mod.base." };

    const std::string name = about.str("name");
    if (source.arch != base.arch) {
        throw std::runtime_error(format("the routers are for %s of architecture '%s', the model has '%s'", name.c_str(), source.arch.c_str(), base.arch.c_str()));
    }
    const struct { const char * key; int64_t value; } numbers[] = {
        { "block_count",      model.hparams.n_layer() },
        { "embedding_length", model.hparams.n_embd    },
        { "vocab_size",       base.n_vocab            },
    };
    for (const auto & n : numbers) {
        if (const int64_t expected = keys.u32(n.key); expected != n.value) {
            throw std::runtime_error(format("the routers are for %s with %s %lld, the model has %lld", name.c_str(), n.key,
                    (long long) expected, (long long) n.value));
        }
    }
    if (!about.has("embedding")) {
        return;
    }
    const size_t n = about.count("embedding");
    if (n != LLAMA_MOD_BASE_N_SAMPLE) {
        throw std::runtime_error(format("mod: key 'adapter.mod.base.embedding' has %zu values, expected %zu", n, LLAMA_MOD_BASE_N_SAMPLE));
    }
    const float distance = llama_mod_base_distance(about.array<float>("embedding", GGUF_TYPE_FLOAT32, n, 1), base.embedding);
    if (!(distance < MOD_UNRELATED_DISTANCE)) { // also where it is not finite
        throw std::runtime_error(format("the routers are for %s, and the model of the same shape has other weights", name.c_str()));
    }
    if (distance > MOD_ROUNDING_DISTANCE) {
        LLAMA_LOG_WARN("%s: the weights differ by %.1f %% from those of %s, as after quantisation or fine-tuning; its routers fit all the same\n",
                __func__, 100.0*distance, name.c_str());
    }
}

int32_t llama_mod_adapter_load(llama_model * model, const char * path) {
    path = path ? path : getenv("LLAMA_MOD_ADAPTER");
    if (!path || !*path) {
        return LLAMA_MOD_OK;
    }
    try {
        mod_check_state(*model);

        mod_adapter_file in(path);
        mod_check_type(in);

        mod_adapter_source source(in);
        mod_check_base(*model, source);

        model->mod = llama_mod_model_read(*model, source);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s: error loading routers: %s\n", __func__, path, err.what());
        return LLAMA_MOD_ERR_ADAPTER;
    }
    return LLAMA_MOD_OK;
}
