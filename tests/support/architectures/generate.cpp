// Writes a tiny random GGUF file of each architecture: upstream's test of architectures makes the
// models, this file writes them all, with the few keys that upstream leaves out.
//
//     generate FOLDER SEED STDEV N_LAYER EXACT [NAME...]
//
// NAME is a file's name without .gguf. One line of JSON per file tells what the model is. Unless EXACT
// is 1, a model has fewer layers where its last one would be a sliding one.

#define main upstream_main
#include "archs.cpp" // tests/test-llama-archs.cpp, in which N_LAYER and N_EMBD replace two numbers
#undef main

#include "../src/llama-model.h"

#include <algorithm>
#include <functional>
#include <set>

#include <sys/wait.h>
#include <unistd.h>

using keys_fn = std::function<void(gguf_context *, const std::string &)>;

struct variant {
    llm_arch    arch;
    std::string name;
    bool        moe;
    keys_fn     keys;
    uint32_t    n_layer = 0; // 0: as the caller says
};

static std::vector<float> repeated(float value) {
    return std::vector<float>(N_LAYER, value);
}

static void set_floats(gguf_context * ctx, const std::string & key, const std::vector<float> & values) {
    gguf_set_arr_data(ctx, key.c_str(), GGUF_TYPE_FLOAT32, values.data(), values.size());
}

// gemma4: each third layer is a full one. `shared` last layers read the K/V of layers before them
static keys_fn gemma4_keys(uint32_t per_layer, uint32_t shared) {
    return [=](gguf_context * ctx, const std::string & a) {
        std::vector<int8_t> sliding(N_LAYER);
        for (size_t il = 0; il < sliding.size(); il++) {
            sliding[il] = il % 3 != 2;
        }
        const std::string pattern = a + "attention.sliding_window_pattern";
        gguf_remove_key(ctx, pattern.c_str());
        gguf_set_arr_data(ctx, pattern.c_str(), GGUF_TYPE_BOOL, sliding.data(), sliding.size());
        gguf_set_val_u32(ctx, (a + "embedding_length_per_layer_input").c_str(), per_layer);
        gguf_set_val_u32(ctx, (a + "attention.shared_kv_layers").c_str(), shared);
        gguf_set_val_u32(ctx, (a + "block_count").c_str(), N_LAYER);
    };
}

// upstream's four layers have one full layer behind another
static void llama4_keys(gguf_context * ctx, const std::string & a) {
    gguf_set_val_u32(ctx, (a + "block_count").c_str(), N_LAYER);
}

static void set_numbers(gguf_context * ctx, const std::string & key, const std::function<uint32_t(uint32_t)> & value) {
    std::vector<uint32_t> values;
    for (uint32_t il = 0; il < N_LAYER; il++) {
        values.push_back(value(il));
    }
    gguf_remove_key(ctx, key.c_str());
    gguf_set_arr_data(ctx, key.c_str(), GGUF_TYPE_UINT32, values.data(), values.size());
}

// two recurrent layers between full ones; upstream's have a single one
static void hybrid_keys(gguf_context * ctx, const std::string & a) {
    for (const char * key : { "attention.head_count", "attention.head_count_kv" }) {
        set_numbers(ctx, a + key, [](uint32_t il) { return il % 4 == 1 || il % 4 == 2 ? 0 : 2; });
    }
}

static void without_windows(gguf_context * ctx, const std::string & a) {
    hybrid_keys(ctx, a);
    gguf_remove_key(ctx, (a + "attention.sliding_window").c_str());
}

// recurrent, FFN, attention, ..: each layer is one of them
static void nemotron_keys(gguf_context * ctx, const std::string & a) {
    gguf_set_val_u32(ctx, (a + "block_count").c_str(), N_LAYER);
    gguf_remove_key(ctx, (a + "attention.head_count").c_str());
    gguf_set_val_u32(ctx, (a + "attention.head_count").c_str(), 2);
    set_numbers(ctx, a + "attention.head_count_kv", [](uint32_t il) { return il % 3 == 2 ? 2 : 0; });
    set_numbers(ctx, a + "feed_forward_length",     [](uint32_t il) { return il % 3 == 1 ? 192 : 0; });
}

static void rwkv7_keys(gguf_context * ctx, const std::string & a) {
    for (const char * rank : { "decay", "iclr", "value_residual_mix", "gate" }) {
        gguf_set_val_u32(ctx, (a + "attention." + rank + "_lora_rank").c_str(), 32);
    }
}

static void parallel_keys(gguf_context * ctx, const std::string & a) {
    gguf_set_val_bool(ctx, (a + "use_parallel_residual").c_str(), true);
}

// rotary values are a part of a head only
static void plm_keys(gguf_context * ctx, const std::string & a) {
    gguf_set_val_u32(ctx, (a + "rope.dimension_count").c_str(), 32);
}

// all layers have two heads, and two recurrent ones lie between full ones, whose heads read the one that is stored
static void kimi_keys(gguf_context * ctx, const std::string & a) {
    gguf_remove_key(ctx, (a + "attention.head_count").c_str());
    gguf_set_val_u32(ctx, (a + "attention.head_count").c_str(), 2);
    set_numbers(ctx, a + "attention.head_count_kv", [](uint32_t il) { return il % 4 == 1 || il % 4 == 2 ? 0 : 1; });
}

static void bailingmoe3_keys(gguf_context * ctx, const std::string & a) {
    kimi_keys(ctx, a);
    set_floats(ctx, a + "swiglu_clamp_exp", repeated(4.0f));
    set_floats(ctx, a + "swiglu_clamp_shexp", repeated(5.0f));
}

// several heads read the one that is stored
static void mla_heads_keys(gguf_context * ctx, const std::string & a) {
    gguf_set_val_u32(ctx, (a + "attention.head_count").c_str(), 4);
}

// the form of older files: K and V of each head are stored
static void decompressed_keys(gguf_context * ctx, const std::string & a) {
    for (const char * part : { "key", "value" }) {
        const std::string length = a + "attention." + part + "_length";
        const std::string mla    = length + "_mla";
        gguf_set_val_u32(ctx, length.c_str(), gguf_get_val_u32(ctx, gguf_find_key(ctx, mla.c_str())));
        gguf_remove_key(ctx, mla.c_str());
    }
    for (const char * heads : { "head_count", "head_count_kv" }) {
        gguf_set_val_u32(ctx, (a + "attention." + heads).c_str(), 2);
    }
}

// three K/V heads, each of two query heads with slopes of their own (ALiBi)
static void grouped_keys(gguf_context * ctx, const std::string & a) {
    gguf_set_val_u32(ctx, (a + "attention.head_count").c_str(), 6);
    gguf_set_val_u32(ctx, (a + "attention.head_count_kv").c_str(), 3);
    gguf_set_val_u32(ctx, (a + "attention.key_length").c_str(), 32);
    gguf_set_val_u32(ctx, (a + "attention.value_length").c_str(), 32);
}

static std::vector<variant> variants(llm_arch arch) {
    const std::string name = llm_arch_name(arch);
    switch (arch) {
        case LLM_ARCH_GEMMA4:
            return {
                { arch, name, false, gemma4_keys(0, 0), 9 },
                { arch, name + "-moe", true, gemma4_keys(0, 0), 9 },
                { arch, name + "-e", false, gemma4_keys(32, 3), 15 },
            };
        case LLM_ARCH_EXAONE4: // 64 layers have sliding windows
            return { { arch, name, false, {} }, { arch, name + "-sliding", false, {}, 64 } };
        case LLM_ARCH_JAMBA:
        case LLM_ARCH_PLAMO2:
        case LLM_ARCH_GRANITE_HYBRID:
        case LLM_ARCH_LFM2MOE:
            return { { arch, name, moe_mandatory(arch), hybrid_keys } };
        case LLM_ARCH_LFM2:
            return { { arch, name, false, without_windows }, { arch, name + "-sliding", false, hybrid_keys } };
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE:
            return { { arch, name, moe_mandatory(arch), nemotron_keys, 9 } };
        case LLM_ARCH_BAICHUAN: // 40 layers have ALiBi
            return { { arch, name, false, {} }, { arch, name + "-alibi", false, {}, 40 } };
        case LLM_ARCH_REFACT:
            return { { arch, name, false, {} }, { arch, name + "-grouped", false, grouped_keys } };
        case LLM_ARCH_PLM:
            return { { arch, name, false, plm_keys } };
        case LLM_ARCH_LLAMA4:
            return { { arch, name, true, llama4_keys } };
        case LLM_ARCH_RWKV7:
        case LLM_ARCH_ARWKV7:
            return { { arch, name, false, rwkv7_keys } };
        case LLM_ARCH_GPTNEOX:
            return { { arch, name, false, {} }, { arch, name + "-parallel", false, parallel_keys } };
        case LLM_ARCH_DEEPSEEK32: // wide layers, and not routed
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_HY_V4:
            return { { arch, name, moe_mandatory(arch), {}, 2 } };
        case LLM_ARCH_BAILINGMOE3:
            return { { arch, name, true, bailingmoe3_keys } };
        case LLM_ARCH_KIMI_LINEAR:
            return { { arch, name, true, kimi_keys } };
        case LLM_ARCH_DEEPSEEK2:
            return {
                { arch, name, true, {} },
                { arch, name + "-heads", true, mla_heads_keys },
                { arch, name + "-decompressed", true, decompressed_keys },
            };
        case LLM_ARCH_DEEPSEEK2OCR:
            return { { arch, name, true, {} } };
        default:
            break;
    }
    if (moe_mandatory(arch)) {
        return { { arch, name, true, {} } };
    }
    if (moe_implemented(arch)) {
        return { { arch, name, false, {} }, { arch, name + "-moe", true, {} } };
    }
    return { { arch, name, false, {} } };
}

// the keys that the model was made from, and its tensors. Upstream's saver refuses some architectures
static void save(const gguf_context * keys, const llama_model & model, const std::string & path) {
    gguf_context_ptr out(gguf_init_empty());
    gguf_set_kv(out.get(), keys);
    std::set<std::string> names;
    for (const auto & [name, tensor] : model.tensors_by_name) {
        if (names.insert(name).second) {
            gguf_add_tensor(out.get(), tensor);
        }
    }
    if (!gguf_write_to_file(out.get(), path.c_str(), false)) {
        throw std::runtime_error("cannot write " + path);
    }
}

template <typename F>
static std::string layers(const llama_model & model, F is) {
    std::string list;
    for (uint32_t il = 0; il < model.hparams.n_layer(); il++) {
        if (is(il)) {
            list += (list.empty() ? "" : ", ") + std::to_string(il);
        }
    }
    return "[" + list + "]";
}

static void describe(const variant & v, const llama_model & model) {
    const llama_hparams & h = model.hparams;
    const bool is_nemotron = v.arch == LLM_ARCH_NEMOTRON_H || v.arch == LLM_ARCH_NEMOTRON_H_MOE;
    printf("{\"name\": \"%s\", \"architecture\": \"%s\", \"n_layer\": %u, \"n_embd\": %u, \"n_swa\": %u, \"swa_type\": %d, "
           "\"alibi\": %s, \"sliding\": %s, \"recurrent\": %s, \"without_kv\": %s, "
           "\"ffn_only\": %s, \"both\": %s}\n",
           v.name.c_str(), llm_arch_name(v.arch), h.n_layer(), h.n_embd, h.swa_type ? h.n_swa : 0, (int) h.swa_type,
           h.use_alibi ? "true" : "false",
           layers(model, [&](uint32_t il) { return h.is_swa(il); }).c_str(),
           layers(model, [&](uint32_t il) { return h.is_recr(il); }).c_str(),
           layers(model, [&](uint32_t il) { return !h.has_kv(il); }).c_str(),
           layers(model, [&](uint32_t il) { return is_nemotron && h.n_ff(il) > 0; }).c_str(),
           v.arch == LLM_ARCH_FALCON_H1 ? "true" : "false");
    fflush(stdout);
}

static void write_model(const variant & v, size_t seed, float stdev, bool exact, const std::string & folder) {
    if (v.n_layer && !exact) {
        N_LAYER = v.n_layer;
    }
    gguf_context_ptr keys = get_gguf_ctx(v.arch, v.moe);
    if (v.keys) {
        v.keys(keys.get(), std::string(llm_arch_name(v.arch)) + ".");
    }
    tensor_data_params data = { seed, stdev };
    llama_model_params params = llama_model_default_params();
    ggml_backend_dev_t devices[] = { nullptr };
    params.devices = devices;
    params.progress_callback = silent_model_load_progress;
    llama_model_ptr model(llama_model_init_from_user(keys.get(), set_tensor_data, &data, params));
    if (!model) {
        throw std::runtime_error("no model");
    }
    const llama_hparams & h = model->hparams;
    if (!exact && !v.n_layer && h.n_layer() == N_LAYER && N_LAYER > 4 && h.is_swa(N_LAYER - 1) && h.has_kv(N_LAYER - 1)) {
        N_LAYER--;
        return write_model(v, seed, stdev, exact, folder);
    }
    save(keys.get(), *model, folder + "/" + v.name + ".gguf");
    describe(v, *model);
}

int main(int argc, char ** argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: %s FOLDER SEED STDEV N_LAYER EXACT [NAME...]\n", argv[0]);
        return 2;
    }
    N_LAYER = std::stoul(argv[4]);
    std::string said;
    llama_log_set([](ggml_log_level level, const char * text, void * said) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            *(std::string *) said += text;
        }
    }, &said);
    const std::set<std::string> wanted(argv + 6, argv + argc);
    for (llm_arch arch : llm_arch_all()) {
        if (arch == LLM_ARCH_UNKNOWN) {
            continue;
        }
        for (const variant & v : variants(arch)) {
            if (!wanted.empty() && !wanted.count(v.name)) {
                continue;
            }
            const pid_t child = fork(); // some architectures abort
            if (child == 0) {
                try {
                    write_model(v, std::stoul(argv[2]), std::stof(argv[3]), argv[5] == std::string("1"), argv[1]);
                } catch (const std::exception & err) {
                    fprintf(stderr, "%s: %s %s\n", v.name.c_str(), err.what(), said.c_str());
                    _exit(1);
                }
                _exit(0);
            }
            int status = 0;
            waitpid(child, &status, 0);
            if (status != 0) {
                printf("{\"name\": \"%s\", \"architecture\": \"%s\"}\n", v.name.c_str(), llm_arch_name(arch));
                fflush(stdout);
            }
        }
    }
    return 0;
}
