#include "llama-mod.h"

#include "llama-context.h"
#include "llama-io.h"
#include "llama-kv-cache-mod.h"
#include "llama-mod-arch.h"
#include "llama-mod-context.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

int32_t llama_mod_api_version(void) {
    return LLAMA_MOD_API_VERSION;
}

//
// model
//

int32_t llama_mod_n_units(const llama_model * model) {
    return model->mod ? model->mod->units.size() : 0;
}

bool llama_mod_get_unit(const llama_model * model, int32_t i, llama_mod_unit * unit) {
    if (i < 0 || i >= llama_mod_n_units(model)) {
        return false;
    }
    *unit = model->mod->units[i];
    return true;
}

int32_t llama_mod_kv_window(const llama_model * model) {
    return model->mod ? model->mod->kv_window : 0;
}

int32_t llama_mod_n_sink(const llama_model * model) {
    return model->mod ? model->mod->n_sink : 0;
}

int32_t llama_mod_layer_window(const llama_model * model, int32_t il) {
    if (il < 0 || il >= (int32_t) model->hparams.n_layer()) {
        return 0;
    }
    return llama_mod_arch_window(model->hparams, il).size;
}

//
// context
//

static bool mod_has_unit(const llama_context * ctx, int32_t i) {
    return i >= 0 && i < llama_mod_n_units(&ctx->get_model());
}

float llama_mod_get_threshold(const llama_context * ctx, int32_t i) {
    const auto * mod = ctx->get_mod();
    return mod && mod_has_unit(ctx, i) ? mod->thresholds[i] : 0.0f;
}

int32_t llama_mod_set_threshold(llama_context * ctx, int32_t i, float p) {
    auto * mod = ctx->get_mod();
    if (!mod) {
        return LLAMA_MOD_ERR_NOT_MOD;
    }
    if (!mod_has_unit(ctx, i)) {
        return LLAMA_MOD_ERR_UNIT;
    }
    if (!(p > 0.0f && p < 1.0f)) {
        return LLAMA_MOD_ERR_VALUE;
    }
    mod->thresholds[i] = p;
    return LLAMA_MOD_OK;
}

float llama_mod_get_shift(const llama_context * ctx) {
    const auto * mod = ctx->get_mod();
    return mod ? mod->shift : 0.0f;
}

int32_t llama_mod_set_shift(llama_context * ctx, float shift) {
    auto * mod = ctx->get_mod();
    if (!mod) {
        return LLAMA_MOD_ERR_NOT_MOD;
    }
    if (!std::isfinite(shift)) {
        return LLAMA_MOD_ERR_VALUE;
    }
    mod->shift = shift;
    return LLAMA_MOD_OK;
}

llama_mod_force llama_mod_get_force(const llama_context * ctx) {
    const auto * mod = ctx->get_mod();
    return mod ? mod->force : LLAMA_MOD_FORCE_NONE;
}

int32_t llama_mod_set_force(llama_context * ctx, llama_mod_force force) {
    auto * mod = ctx->get_mod();
    if (!mod) {
        return LLAMA_MOD_ERR_NOT_MOD;
    }
    if (force != LLAMA_MOD_FORCE_NONE && force != LLAMA_MOD_FORCE_ACTIVE && force != LLAMA_MOD_FORCE_INACTIVE) {
        return LLAMA_MOD_ERR_VALUE;
    }
    mod->force = force;
    return LLAMA_MOD_OK;
}

int32_t llama_mod_get_kv_rollback(const llama_context * ctx) {
    const auto * mod = ctx->get_mod();
    return mod ? mod->get_memory()->get_rollback() : 0;
}

int32_t llama_mod_set_kv_rollback(llama_context * ctx, int32_t n) {
    auto * mod = ctx->get_mod();
    if (!mod) {
        return LLAMA_MOD_ERR_NOT_MOD;
    }
    if (n < 0 || n > INT32_MAX/4) {
        return LLAMA_MOD_ERR_VALUE;
    }
    mod->get_memory()->set_rollback(n);
    return LLAMA_MOD_OK;
}

// a state in memory of which only the head is read
class mod_head_reader : public llama_io_read_i {
public:
    mod_head_reader(const uint8_t * src, size_t size) : src(src), size(size) {}

    void read(void * dst, size_t n) override {
        if (n > size - at) {
            throw std::runtime_error("mod: the state is cut off");
        }
        memcpy(dst, src + at, n);
        at += n;
    }

    void read_tensor(ggml_tensor *, size_t, size_t) override {
        throw std::runtime_error("mod: the head of a state has no tensors");
    }

    size_t n_bytes() override { return at; }

private:
    const uint8_t * src;
    const size_t    size;
    size_t          at = 0;
};

bool llama_mod_checkpoint_fits(llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq_id) {
    const auto * mod = ctx->get_mod();
    if (!mod || seq_id < 0 || seq_id >= (llama_seq_id) ctx->n_seq_max()) {
        return false;
    }
    mod_head_reader io(src, size);
    try {
        uint32_t     magic;
        llama_seq_id seq_id_src;
        io.read(&magic,      sizeof(magic));
        io.read(&seq_id_src, sizeof(seq_id_src));
        mod->get_memory()->checkpoint_check(io, seq_id);
        return true;
    } catch (const std::exception &) {
        return false;
    }
}

bool llama_mod_set_adaptive_threads(llama_context * ctx, bool enabled) {
    if (enabled && !ctx->get_model().devices.empty()) {
        return false;
    }
    ctx->mod_threads.enabled = enabled;
    return true;
}

int32_t llama_mod_n_threads(const llama_context * ctx) {
    return ctx->mod_threads.last();
}

bool llama_mod_get_unit_stats(const llama_context * ctx, int32_t i, llama_mod_unit_stats * stats) {
    const auto * mod = ctx->get_mod();
    if (!mod || !mod_has_unit(ctx, i)) {
        return false;
    }
    *stats = mod->stats[i];
    return true;
}

bool llama_mod_get_perf(const llama_context * ctx, llama_mod_perf * perf) {
    const auto * mod = ctx->get_mod();
    if (!mod) {
        return false;
    }
    *perf = mod->perf;
    return true;
}

void llama_mod_reset_stats(llama_context * ctx) {
    if (auto * mod = ctx->get_mod()) {
        std::fill(mod->stats.begin(), mod->stats.end(), llama_mod_unit_stats{});
        mod->perf = {};
    }
}

bool llama_mod_get_kv_stats(const llama_context * ctx, int32_t il, llama_mod_kv_stats * stats) {
    const auto * mod = ctx->get_mod();
    if (!mod || il >= (int32_t) ctx->get_model().hparams.n_layer()) {
        return false;
    }
    mod->get_memory()->kv_stats(il, *stats);
    return true;
}

bool llama_mod_get_kv_seq_stats(const llama_context * ctx, llama_seq_id seq_id, llama_mod_kv_seq_stats * stats) {
    const auto * mod = ctx->get_mod();
    if (!mod || seq_id < 0 || seq_id >= (llama_seq_id) ctx->n_seq_max()) {
        return false;
    }
    mod->get_memory()->kv_seq_stats(seq_id, *stats);
    return true;
}

int32_t llama_mod_get_trace(const llama_context * ctx, const uint8_t ** active, const float ** score) {
    const auto * mod = ctx->get_mod();
    if (active) {
        *active = mod ? mod->trace_active.data() : nullptr;
    }
    if (score) {
        *score = mod ? mod->trace_score.data() : nullptr;
    }
    return mod ? mod->trace_active.size()/mod->model.units.size() : 0;
}
