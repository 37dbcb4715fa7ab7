#pragma once

#include "llama-arch.h"
#include "llama-mod-mask.h"
#include "llama-mod.h"

#include <cstdint>
#include <string>

struct llama_hparams;
struct llama_model;

// What is known of architectures besides what their graphs show. Graphs are cut at names and functions that nearly all
// have in common (llama-mod-graph.h), and each context checks that the cuts of its model are right.

// why no layer of the model can be routed, empty: it is not known that none can
std::string llama_mod_arch_refuses(const llama_model & model);

// why the layer cannot have a unit of the kind, empty: it is not known that it cannot
std::string llama_mod_arch_refuses(const llama_model & model, int32_t il, llama_mod_kind kind);

// what the layer's attention sees; size 0: all tokens
llama_mod_window llama_mod_arch_window(const llama_hparams & hparams, int32_t il);

// the layer whose K and V layer il reads: il, or an earlier one that shares them
int32_t llama_mod_arch_kv_source(const llama_hparams & hparams, int32_t il);

// has the layer a recurrent state? does it attend to K and V? some have both
bool llama_mod_arch_has_state(const llama_model & model, int32_t il);
bool llama_mod_arch_has_attn (const llama_model & model, int32_t il);

// is the layer an FFN alone, where others have no FFN?
bool llama_mod_arch_is_ffn(llm_arch arch, const llama_hparams & hparams, int32_t il);

// the name of the residual stream between attention and FFN, null: each layer is one of them
const char * llama_mod_arch_middle(llm_arch arch);

// the name of the stream behind the layer, null: build_cvec() ends it
const char * llama_mod_arch_end(llm_arch arch);

// do layers read the tokens, besides the stream? then a part of the model embeds its tokens again
bool llama_mod_arch_reads_tokens(const llama_model & model);

// why embeddings in place of tokens cannot be decoded, empty: they can
std::string llama_mod_arch_refuses_embd(const llama_model & model);
