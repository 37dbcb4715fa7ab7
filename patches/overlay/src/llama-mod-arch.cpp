#include "llama-mod-arch.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <climits>
#include <map>
#include <set>

// one word for each reason that has no hyperparameter to be read from
static const std::map<llm_arch, const char *> MOD_REFUSED = {
    { LLM_ARCH_GEMMA3N,          "its layers pass on several streams (AltUp)" },
    { LLM_ARCH_DEEPSEEK32,       "its layers select keys by an indexer with a cache of its own" },
    { LLM_ARCH_GLM_DSA,          "its layers select keys by an indexer with a cache of its own" },
    { LLM_ARCH_DOTS3NOTE,        "its layers select keys by an indexer with a cache of its own" },
    { LLM_ARCH_GLM5_NEXT,        "its layers select keys by an indexer with a cache of its own" },
    { LLM_ARCH_MINIMAX_M3,       "its layers select keys by an indexer with a cache of its own" },
    { LLM_ARCH_HY_V4,            "its layers pass on several streams (hyper-connections)" },
    { LLM_ARCH_DEEPSEEK4,        "its layers pass on several streams (hyper-connections)" },
    { LLM_ARCH_QWEN4EXP,         "its layers pass on several streams (hyper-connections)" },
    { LLM_ARCH_KIMI_K3,          "its layers add up what all layers before have computed" },
    { LLM_ARCH_HRM_TEXT,         "it runs its layers several times" },
    { LLM_ARCH_NANBEIGE,         "it runs its layers several times" },
    { LLM_ARCH_GRANITE_SWITCH,   "its layers read which adapter a token has" },
    { LLM_ARCH_TALKIE,           "its layers read the embeddings of the tokens" },
    { LLM_ARCH_COGVLM,           "its layers have other weights for images" },
    { LLM_ARCH_CHAMELEON,        "its head hides the tokens of images" },
    { LLM_ARCH_T5,               "it has an encoder" },
    { LLM_ARCH_T5ENCODER,        "it is an encoder" },
    { LLM_ARCH_CLIP,             "it is an encoder" },
    { LLM_ARCH_BERT,             "it is an encoder" },
    { LLM_ARCH_MODERN_BERT,      "it is an encoder" },
    { LLM_ARCH_NOMIC_BERT,       "it is an encoder" },
    { LLM_ARCH_NOMIC_BERT_MOE,   "it is an encoder" },
    { LLM_ARCH_NEO_BERT,         "it is an encoder" },
    { LLM_ARCH_JINA_BERT_V2,     "it is an encoder" },
    { LLM_ARCH_JINA_BERT_V3,     "it is an encoder" },
    { LLM_ARCH_EUROBERT,         "it is an encoder" },
    { LLM_ARCH_GEMMA_EMBEDDING,  "it is an encoder" },
    { LLM_ARCH_LLAMA_EMBED,      "it is an encoder" },
    { LLM_ARCH_WAVTOKENIZER_DEC, "it is no language model" },
    { LLM_ARCH_QWEN3TTS,         "it is no language model" },
    { LLM_ARCH_POCKETTTS,        "it is no language model" },
    { LLM_ARCH_EAGLE3,           "it is the draft head of another model" },
    { LLM_ARCH_DFLASH,           "it is the draft head of another model" },
    { LLM_ARCH_GEMMA4_ASSISTANT, "it is the draft head of another model" },
};

// those with recurrent layers that run
static const std::set<llm_arch> MOD_HYBRID = {
    LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN35, LLM_ARCH_QWEN35MOE, LLM_ARCH_LFM2, LLM_ARCH_LFM2MOE, LLM_ARCH_GRANITE_HYBRID,
    LLM_ARCH_JAMBA, LLM_ARCH_FALCON_H1, LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE, LLM_ARCH_PLAMO2,
    LLM_ARCH_KIMI_LINEAR, LLM_ARCH_BAILINGMOE3, LLM_ARCH_MINIMAX_01,
};

static bool mod_slides(const llama_hparams & hparams, int32_t il) {
    return hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.is_swa(il);
}

llama_mod_window llama_mod_arch_window(const llama_hparams & hparams, int32_t il) {
    if (!mod_slides(hparams, il)) {
        return {};
    }
    const bool chunked = hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED;

    return { (llama_pos) hparams.n_swa, chunked ? llama_mod_window::chunked : llama_mod_window::sliding };
}

int32_t llama_mod_arch_kv_source(const llama_hparams & hparams, int32_t il) {
    if (hparams.has_kv(il)) {
        return il;
    }
    // as in llama_model::create_memory(): the last layer of the same kind that has K and V
    return hparams.n_layer_kv_from_start - (hparams.is_swa(il) ? 2 : 1);
}

static bool mod_is_nemotron(llm_arch arch) {
    return arch == LLM_ARCH_NEMOTRON_H || arch == LLM_ARCH_NEMOTRON_H_MOE;
}

bool llama_mod_arch_is_ffn(llm_arch arch, const llama_hparams & hparams, int32_t il) {
    return mod_is_nemotron(arch) && hparams.n_ff(il) > 0;
}

// as the layer filters of llama_model::create_memory()

bool llama_mod_arch_has_state(const llama_model & model, int32_t il) {
    return il < (int32_t) model.hparams.n_layer() && llm_arch_is_hybrid(model.arch) &&
        (model.hparams.is_recr(il) || model.arch == LLM_ARCH_FALCON_H1);
}

bool llama_mod_arch_has_attn(const llama_model & model, int32_t il) {
    return !llm_arch_is_hybrid(model.arch) || model.arch == LLM_ARCH_FALCON_H1 ||
        (!model.hparams.is_recr(il) && !llama_mod_arch_is_ffn(model.arch, model.hparams, il));
}

// do layers that share K and V see the same tokens, and are their heads alike?
static bool mod_can_share(const llama_hparams & hparams, int32_t source, int32_t il) {
    return hparams.is_swa(source) == hparams.is_swa(il) &&
        hparams.n_embd_k_gqa(source) == hparams.n_embd_k_gqa(il) &&
        hparams.n_embd_v_gqa(source) == hparams.n_embd_v_gqa(il);
}

// why the memory cannot hold the K and V of the layer
static std::string mod_refuses_kv(const llama_hparams & hparams, int32_t il) {
    if (mod_slides(hparams, il) && (hparams.n_swa == 0 || hparams.n_swa > INT_MAX)) {
        return format("layer %d has a sliding window of %u tokens", il, hparams.n_swa);
    }
    const int32_t source = llama_mod_arch_kv_source(hparams, il);
    if (source < 0) {
        return format("layer %d has no K/V, and no layer before it has any", il);
    }
    if (source != il && !mod_can_share(hparams, source, il)) {
        return format("layer %d reads the K/V of layer %d, whose attention is of another kind", il, source);
    }
    return "";
}

std::string llama_mod_arch_refuses(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (const auto it = MOD_REFUSED.find(model.arch); it != MOD_REFUSED.end()) {
        return it->second;
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return "its layers have a recurrent state and no attention";
    }
    if (llm_arch_is_hybrid(model.arch) && MOD_HYBRID.count(model.arch) == 0) {
        return "some of its layers have a recurrent state";
    }
    if (llm_arch_is_diffusion(model.arch) || !hparams.causal_attn) {
        return "its attention is not causal";
    }
    if (hparams.swa_type == LLAMA_SWA_TYPE_SYMMETRIC) {
        return "its sliding windows look ahead";
    }
    for (int32_t il = 0; il < (int32_t) hparams.n_layer(); ++il) {
        if (const std::string why = mod_refuses_kv(hparams, il); !why.empty()) {
            return why;
        }
    }
    return "";
}

// why all tokens must be remembered in the layer
static std::string mod_keeps_kv(const llama_hparams & hparams, int32_t il) {
    if (mod_slides(hparams, il)) {
        return "it attends to a sliding window, where only ffn units can be";
    }
    if (const int32_t source = llama_mod_arch_kv_source(hparams, il); source != il) {
        return format("it reads the K/V of layer %d", source);
    }
    for (int32_t i = il + 1; i < (int32_t) hparams.n_layer(); ++i) {
        if (llama_mod_arch_kv_source(hparams, i) == il) {
            return format("layer %d reads its K/V", i);
        }
    }
    return "";
}

std::string llama_mod_arch_refuses(const llama_model & model, int32_t il, llama_mod_kind kind) {
    const auto & hparams = model.hparams;

    if (kind != LLAMA_MOD_KIND_FFN && !llama_mod_arch_has_attn(model, il)) {
        return llama_mod_arch_has_state(model, il) ?
            "it has a recurrent state, where only ffn units can be" : "it has no attention, so that only ffn units can be there";
    }
    if ((kind == LLAMA_MOD_KIND_ATTN || kind == LLAMA_MOD_KIND_BLOCK) && llama_mod_arch_has_state(model, il)) {
        return "it has a recurrent state beside its attention, where only ffn and kv units can be";
    }
    if (kind != LLAMA_MOD_KIND_FFN) {
        if (const std::string why = mod_keeps_kv(hparams, il); !why.empty()) {
            return why;
        }
    }
    if (kind == LLAMA_MOD_KIND_ATTN && mod_is_nemotron(model.arch)) {
        return "its attention is all that it has, which a block unit skips";
    }
    if (kind == LLAMA_MOD_KIND_FFN && mod_is_nemotron(model.arch) && !llama_mod_arch_is_ffn(model.arch, hparams, il)) {
        return "it has no FFN";
    }
    if (kind == LLAMA_MOD_KIND_FFN && model.arch == LLM_ARCH_GEMMA4) {
        return "what follows the FFN changes the whole residual stream, so that skipping the FFN alone is impossible";
    }
    if (il < (int32_t) hparams.n_deepstack_layers) {
        return "embeddings of images are added to its output (deepstack)";
    }
    return "";
}

const char * llama_mod_arch_middle(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_BAILINGMOE2: return "sa_out";
        case LLM_ARCH_GEMMA4:      return "attn_out";
        case LLM_ARCH_QWEN3NEXT:
        case LLM_ARCH_QWEN35:
        case LLM_ARCH_QWEN35MOE:
        case LLM_ARCH_PLAMO2:
        case LLM_ARCH_PLAMO3:      return "attn_residual";
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE: return nullptr;
        default:                   return "ffn_inp";
    }
}

const char * llama_mod_arch_end(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_PLAMO2:         return "ffn_residual";
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE: return "nemotron_h_block_out";
        default:                      return nullptr;
    }
}

bool llama_mod_arch_reads_tokens(const llama_model & model) {
    return model.arch == LLM_ARCH_GEMMA4 && model.hparams.n_embd_per_layer > 0;
}

std::string llama_mod_arch_refuses_embd(const llama_model & model) {
    if (model.hparams.n_pos_per_embd() > 1) {
        return "positions of several dimensions";
    }
    if (model.hparams.n_deepstack_layers > 0) {
        return "embeddings of images that are added in several layers";
    }
    if (llama_mod_arch_reads_tokens(model)) {
        return "layers that read the tokens";
    }
    return "";
}
