#include "llama-mod-context.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include <cstring>
#include <stdexcept>

// The hidden states that draft heads read, beside kv units: there every segment runs for all tokens. Those behind the last
// layer are in the last segment's graph, where upstream's code finds them (t_h_nextn). The inputs of layers (t_layer_inp),
// with what the last one puts out, are in the graphs of several segments, and each is read while its segment runs.

void llama_mod_context::check_hidden(const std::string & what, bool known) const {
    model.check_hidden();
    if (!known) {
        throw std::runtime_error(format("mod: draft heads cannot read %s: the graph of architecture '%s' does not have it",
                what.c_str(), llm_arch_name(lctx.model.arch)));
    }
}

void llama_mod_context::check_last_state() const {
    check_hidden("the hidden state behind the last layer", knows_last_state);
}

void llama_mod_context::check_layer_input(uint32_t il) const {
    check_hidden(format("the input of layer %u", il), layer_inputs.at(il).known);
}

void llama_mod_context::init_hidden(const llm_graph_result & res) {
    knows_last_state = res.get_h_nextn() != nullptr;

    layer_inputs.resize(lctx.model.hparams.n_layer() + 1);
    for (size_t il = 0; il < layer_inputs.size(); ++il) {
        layer_inputs[il].known = res.get_layer_inp(il) && res.get_layer_inp(il) != whole.h;
    }
}

std::vector<bool> llama_mod_context::find_layer_inputs(const llm_mod_segment & seg) const {
    auto res = lctx.cparams.embeddings_layer_inp;
    for (int32_t il = 0; il < (int32_t) res.size(); ++il) {
        res[il] = res[il] && (2*il < seg.t1 || seg.last) && (2*il > seg.t0 || seg.first);
    }
    return res;
}

void llama_mod_context::read_layer_input(int32_t il, ggml_backend_t backend, const ggml_tensor * t, uint32_t n_tokens) {
    auto & data = layer_inputs[il].data;
    data.resize(t->ne[0]*n_tokens);
    ggml_backend_tensor_get_async(backend, t, data.data(), 0, data.size()*sizeof(float));
    ggml_backend_synchronize(backend);
}

void llama_mod_context::read_stream(const llm_mod_segment & seg, uint32_t n_tokens) {
    const auto & asked = lctx.cparams.embeddings_layer_inp;
    const int32_t   il = seg.t0/2;
    if (!seg.first && seg.t0 % 2 == 0 && il < (int32_t) layer_inputs.size() && asked[il]) {
        ggml_backend_sched_synchronize(lctx.sched.get()); // the segment before
        read_layer_input(il, get_backend(lctx.model.dev_layer(0)), seg.h, n_tokens);
    }
}

void llama_mod_context::read_layer_inputs(const llm_graph_params & params) {
    const auto & inside = params.cparams.embeddings_layer_inp;
    for (int32_t il = 0; il < (int32_t) layer_inputs.size(); ++il) {
        if (inside[il]) {
            auto * t = params.res->get_layer_inp(il);
            read_layer_input(il, ggml_backend_sched_get_tensor_backend(lctx.sched.get(), t), t, params.ubatch.n_tokens);
        }
    }
}

bool llama_mod_context::extract_layer_inputs(size_t token_offset, size_t n_tokens) const {
    bool res = false;
    for (size_t il = 0; il < layer_inputs.size(); ++il) {
        if (lctx.cparams.embeddings_layer_inp[il]) {
            const auto & data = layer_inputs[il].data;
            auto       & dst  = lctx.embd_layer_inp[il];

            const size_t offset = token_offset*(data.size()/n_tokens);
            GGML_ASSERT(offset + data.size() <= dst.size);
            memcpy(dst.data + offset, data.data(), data.size()*sizeof(float));
            res = true;
        }
    }
    return res;
}
