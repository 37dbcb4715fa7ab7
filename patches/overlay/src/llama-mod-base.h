#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_model_loader;

// how many numbers of a matrix are its sample
constexpr size_t LLAMA_MOD_BASE_N_SAMPLE = 128;

// which model a file holds, as far as routers need to know; read when the model is loaded. Contexts hold it too
struct llama_mod_base {
    std::string arch; // general.architecture

    // of what decides the K/V of a token, routers apart: hyperparameters, samples of the weights. All weights would have
    // to be read for more
    uint64_t digest = 0;

    int64_t n_vocab = 0; // rows of the embedding, 0: unknown

    // numbers of the embedding, as mod_export/formats/base_identity.py takes them; empty where they cannot be read
    std::vector<float> embedding;
};

std::shared_ptr<const llama_mod_base> llama_mod_base_load(const llama_model_loader & ml);

// how far two samples are apart, |expected - actual|/|expected|; 0 where one is empty
float llama_mod_base_distance(const std::vector<float> & expected, const std::vector<float> & actual);

// the layer and the kind in the name of a router's tensor; false for another tensor
bool llama_mod_parse_name(const std::string & name, int32_t & il, std::string & kind);
