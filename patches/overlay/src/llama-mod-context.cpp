#include "llama-mod-context.h"

#include "llama-adapter.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-mod.h"
#include "llama-mod-arch.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include "ggml-mod.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

static float logit(float p) {
    return logf(p) - logf(1.0f - p);
}

static bool mod_is_cpu(const std::vector<ggml_backend_ptr> & backends) {
    return backends.size() == 1 && ggml_backend_dev_type(ggml_backend_get_device(backends[0].get())) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

// asked of the registry: a device may say yes to any custom op (RPC does)
static bool mod_has_ops(const llama_model & model) {
    for (int32_t il = 0; il < (int32_t) model.hparams.n_layer(); ++il) {
        auto * dev = model.dev_layer(il);
        auto * reg = ggml_backend_dev_backend_reg(dev); // none: a device made of several
        if (ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU &&
            (!reg || !ggml_backend_reg_get_proc_address(reg, GGML_MOD_OPS_PROC))) {
            return false;
        }
    }
    return true;
}

// one graph for a token pays where its device skips inside it. With layers on several devices it would not: the residual
// stream is on the first one, so the units of the others are cut. The CPU computes everything there, which is for tests
static bool mod_skips_inside(const llama_model & model, bool is_cpu) {
    auto * dev = model.dev_layer(0);
    for (int32_t il = 1; il < (int32_t) model.hparams.n_layer(); ++il) {
        if (model.dev_layer(il) != dev) {
            return false;
        }
    }
    if (is_cpu || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return is_cpu;
    }
    auto * reg   = ggml_backend_dev_backend_reg(dev);
    auto * skips = reg ? (ggml_mod_skips_t) ggml_backend_reg_get_proc_address(reg, GGML_MOD_SKIPS_PROC) : nullptr;

    return skips && skips();
}

// what an environment variable says, -1: nothing
static int mod_get_choice(const char * name, const std::vector<std::string> & known) {
    const char * env = getenv(name);
    if (!env) {
        return -1;
    }
    const auto it = std::find(known.begin(), known.end(), env);
    if (it == known.end()) {
        std::string all;
        for (const auto & k : known) {
            all += (all.empty() ? "" : " or ") + k;
        }
        throw std::runtime_error(format("%s=%s: known is %s", name, env, all.c_str()));
    }
    return it - known.begin();
}

static bool mod_decodes_as_graph(const llama_model & model, bool is_cpu) {
    if (mod_get_choice("LLAMA_MOD_DECODE", { "graph" }) != 0) {
        return false;
    }
    const bool ok = mod_has_ops(model) && mod_skips_inside(model, is_cpu);
    if (!ok) {
        LLAMA_LOG_WARN("%s: LLAMA_MOD_DECODE=graph needs all layers on one device that skips inside CUDA graphs: segments instead\n", __func__);
    }
    return ok;
}

// of the norm that the model itself has; LayerNorm models have no other one
static float mod_get_eps(const llama_hparams & hparams) {
    return hparams.f_norm_rms_eps != 0.0f ? hparams.f_norm_rms_eps : hparams.f_norm_eps;
}

llama_mod_context::llama_mod_context(llama_context & lctx) :
    model(*lctx.get_model().mod), lctx(lctx), n_units(model.units.size()), is_cpu(mod_is_cpu(lctx.backends)),
    on_device(mod_decodes_as_graph(lctx.model, is_cpu)),
    inputs((io) (mod_get_choice("LLAMA_MOD_INPUTS", { "block", "each" }) + 1)) {

    for (const auto & u : model.units) {
        thresholds.push_back(u.threshold);
        if (u.kind == LLAMA_MOD_KIND_KV && (kv_window_min == 0 || u.window < kv_window_min)) {
            kv_window_min = u.window;
        }
    }
    stats.resize(n_units);

    init_tensors();

    get_memory()->set_synchronize([this] { ggml_backend_sched_synchronize(this->lctx.sched.get()); });
    get_memory()->set_origin([this] { return get_origin(); });

    whole.kv_inside = true;
    whole.first     = true;
    whole.last      = true;
    whole.reserve   = true;
    whole.has_ops   = mod_has_ops(lctx.model);
    whole.eps       = mod_get_eps(lctx.model.hparams);
    whole.t1        = 2*lctx.model.hparams.n_layer();

    init_scratch();
    check_segments();
}

llama_mod_context::~llama_mod_context() {
    restore_sched();
}

void llama_mod_context::init_tensors() {
    const int64_t n_embd   = lctx.model.hparams.n_embd;
    const int64_t n_ubatch = lctx.cparams.n_ubatch;

    ggml_init_params ip = { 2*ggml_tensor_overhead(), nullptr, true };
    ctx.reset(ggml_init(ip));

    whole.model = &model;
    whole.h = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_ubatch + 1);

    whole.routes = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 4, n_units);

    ggml_set_name(whole.h, "mod_h");

    ggml_set_name(whole.routes, "mod_routes");

    // where the layers are: with several devices that of the first layer, the scheduler copies for the others
    auto * buft = ggml_backend_dev_buffer_type(lctx.model.dev_layer(0));
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));

    // scores of all units at most once, or the routes
    const size_t n_read = std::max<size_t>(n_ubatch*n_units*sizeof(float), ggml_nbytes(whole.routes));
    if (!buf || !outputs.init(lctx.model.dev_layer(0), n_read)) {
        throw std::runtime_error("mod: failed to allocate the residual stream");
    }

    ggml_backend_buffer_clear(buf.get(), 0);

    for (int32_t il = 0; il < (int32_t) lctx.model.hparams.n_layer(); ++il) {
        init_routers(lctx.model.dev_layer(il));
    }
}

void llama_mod_context::init_routers(ggml_backend_dev_t dev) {
    auto & [rctx, rbuf] = routers[dev];
    if (!rctx) {
        ggml_init_params ip = { 2*ggml_tensor_overhead(), nullptr, true };
        rctx.reset(ggml_init(ip));

        auto * w = ggml_new_tensor_2d(rctx.get(), GGML_TYPE_F32, lctx.model.hparams.n_embd, n_units);
        auto * b = ggml_new_tensor_1d(rctx.get(), GGML_TYPE_F32, n_units);
        ggml_set_name(w, "mod_w");
        ggml_set_name(b, "mod_b");

        rbuf.reset(ggml_backend_alloc_ctx_tensors_from_buft(rctx.get(), ggml_backend_dev_buffer_type(dev)));
        if (!rbuf) {
            throw std::runtime_error("mod: failed to allocate the routers");
        }
        ggml_backend_tensor_set(w, model.w.data(), 0, ggml_nbytes(w));
        ggml_backend_tensor_set(b, model.b.data(), 0, ggml_nbytes(b));
    }
    whole.w.push_back(ggml_get_first_tensor(rctx.get()));
    whole.b.push_back(ggml_get_next_tensor(rctx.get(), whole.w.back()));
}

void llama_mod_context::init_scratch() {
    const size_t n_nodes = lctx.graph_max_nodes(lctx.cparams.n_ubatch);

    buf_scratch.resize(ggml_graph_overhead_custom(n_nodes, false));
    ctx_scratch.reset(ggml_init({ buf_scratch.size(), buf_scratch.data(), true }));
    whole.scratch = ggml_new_graph_custom(ctx_scratch.get(), n_nodes, false);
}

void llama_mod_context::init_plan(std::vector<piece> & plan, bool cut_kv, const std::set<int32_t> & middles) {
    const int32_t n_layer = lctx.model.hparams.n_layer();

    plan.clear();

    const auto add = [&](int32_t t0, int32_t t1, int32_t unit) {
        auto seg = whole;
        seg.reserve   = false;
        seg.first     = false;
        seg.last      = false;
        seg.kv_inside = !cut_kv;
        seg.t0   = t0;
        seg.t1   = t1;
        seg.unit = unit;
        plan.push_back({ seg, {} });
    };

    // the halves that run for all tokens are merged
    add(0, 0, -1);
    for (int32_t t = 0; t < 2*n_layer; ) {
        const int32_t il = t/2;

        const int32_t u_half  = model.find(il, t % 2 == 0 ? LLAMA_MOD_KIND_ATTN : LLAMA_MOD_KIND_FFN);
        const int32_t u_block = t % 2 == 0 ? model.find(il, LLAMA_MOD_KIND_BLOCK) : -1;
        const int32_t u       = u_block >= 0 ? u_block : u_half;
        const int32_t t1      = t + (u_block >= 0 ? 2 : 1);

        const bool cut = cut_kv && t % 2 == 0 && model.find(il, LLAMA_MOD_KIND_KV) >= 0;

        if (u_block >= 0 && il == n_layer - 1 && !model.scale_output && middles.count(il) > 0) {
            // behind the last attention only the rows that are output go on
            add(t,     t + 1, u);
            add(t + 1, t1,    u);
        } else if (u >= 0 || cut || plan.back().seg.unit >= 0) {
            add(t, t1, u);
        } else {
            plan.back().seg.t1 = t1;
        }
        t = t1;
    }
    if (plan.back().seg.unit >= 0) {
        add(2*n_layer, 2*n_layer, -1);
    }

    plan.front().seg.first = true;
    plan.back() .seg.last  = true;

    // a segment scores the units that decide before the next segment for all tokens has run:
    // h of a token does not change while it skips, so its scores stay valid over a run of units
    for (size_t i = 0; i + 1 < plan.size(); ++i) {
        size_t j = i + 1;
        while (j + 1 < plan.size() && plan[j].seg.unit >= 0) {
            ++j;
        }
        // plan[j] runs for all: if it is cut at a kv unit, that one decides before it, else inside
        const auto & next = plan[j].seg;
        auto & seg = plan[i].seg;
        seg.u0 = model.first(seg.t1);
        seg.u1 = model.first(next.t0);
        if (cut_kv && next.unit < 0 && next.t0 % 2 == 0 && next.t0 < 2*n_layer) {
            seg.u1 = model.first(next.t0 + 1);
        }
    }
}

//
// are the segments right?
//

// the tensor that a view is of
static const ggml_tensor * mod_base(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// inputs that follow from the positions of the tokens
static const std::set<std::string> MOD_POSITION_INPUTS = {
    "inp_pos", "inp_attn_scale", "slopes", "q_decay_exp", "k_decay_exp", "diag_decay_exp",
};

size_t llama_mod_context::check_segment(llm_mod_segment & seg, llm_graph_params & params) const {
    const auto & hparams = lctx.model.hparams;

    params.mod = &seg;
    params.res->reset();
    params.res->t_layer_inp[hparams.n_layer()] = seg.h; // stays where the graph cannot have what the last layer puts out
    auto * gf = lctx.model.build_graph(params);

    if (!seg.is_whole) {
        const bool odd = seg.t0 % 2 == 1 || seg.t1 % 2 == 1;
        throw std::runtime_error(odd ?
                "its layers have no residual stream between attention and FFN: attn and ffn units are impossible there, block and kv units are not" :
                "its residual stream is not where it is in other architectures");
    }

    // what the graph may read besides weights, cache and h, which have memory
    const bool reads_tokens = seg.first || llama_mod_arch_reads_tokens(lctx.model);
    auto known = llm_mod_graph_attn_inputs(seg);

    bool has_h = seg.first;
    std::set<const ggml_tensor *> leafs;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const auto * node = ggml_graph_node(gf, i);
        for (int j = -1; j < GGML_MAX_SRC; ++j) {
            const auto * src = j < 0 ? node->view_src : node->src[j];
            if (!src || src == node || known.count(src) > 0) {
                continue;
            }
            leafs.insert(src);

            const std::string name = src->name;
            has_h = has_h || mod_base(src) == seg.h;

            const bool ok = src->op == GGML_OP_NONE && (mod_base(src)->buffer || hparams.no_alloc ||
                MOD_POSITION_INPUTS.count(name) > 0 || name == "out_ids" || name.compare(0, 4, "mod_") == 0 ||
                (seg.last && (name == "mean" || name == "cls")) || // pooled embeddings
                (reads_tokens && (src->flags & GGML_TENSOR_FLAG_INPUT)));
            if (!ok) {
                throw std::runtime_error(format("what layer %d computes depends on more than the residual stream ('%s')", seg.t0/2, src->name));
            }
        }
        known.insert(node);
    }
    if (!has_h) {
        throw std::runtime_error(format("what layer %d computes does not depend on the residual stream", seg.t0/2));
    }

    size_t n_tensors = leafs.size();
    for (auto * t = ggml_get_first_tensor(params.res->get_ctx()); t; t = ggml_get_next_tensor(params.res->get_ctx(), t)) {
        n_tensors++;
    }
    return n_tensors;
}

void llama_mod_context::check_segments() {
    const int32_t n_layer = lctx.model.hparams.n_layer();
    const size_t  n_nodes = lctx.graph_max_nodes(lctx.cparams.n_ubatch);

    llama_batch_allocr balloc(lctx.model.hparams.n_pos_per_embd());
    const auto ubatch  = balloc.ubatch_reserve(std::max(2u, std::min(8u, lctx.cparams.n_ubatch)), 1);
    const auto ubatch1 = balloc.ubatch_reserve(1, 1);

    const llm_graph_result_ptr     res (new llm_graph_result(n_nodes));
    const llama_memory_context_ptr mctx(get_memory()->init_full());

    auto params = lctx.graph_params(res.get(), ubatch, mctx.get(), LLM_GRAPH_TYPE_DEFAULT);
    params.n_outputs = lctx.cparams.embeddings ? ubatch.n_tokens : 1;
    params.cb = [](const llama_ubatch &, ggml_tensor * cur, const char * name, int il) {
        il < 0 ? ggml_set_name(cur, name) : ggml_format_name(cur, "%s-%d", name, il);
    };

    const llm_mod_segment * seg = &whole;
    try {
        // some graphs have these hidden states only where they are asked for
        params.cparams.embeddings_nextn = true;
        params.cparams.embeddings_layer_inp[n_layer] = true;
        check_segment(whole, params);
        init_hidden(*res);
        params.cparams = lctx.cparams;

        const auto check_plans = [&](const std::set<int32_t> & middles) {
            init_plan(plan_cut,    true,  middles);
            init_plan(plan_joined, false, middles);

            for (auto * plan : { &plan_cut, &plan_joined }) {
                for (auto & p : *plan) {
                    seg = &p.seg;

                    auto s = p.seg;
                    if (s.unit >= 0) {
                        s.gather = true;
                        s.gate.resize(model.scale_output ? 2 : 0);
                    }
                    p.n_tensors = check_segment(s, params);
                }
            }
        };

        auto middles = whole.middles;
        try {
            check_plans(middles);
        } catch (const std::exception &) {
            // a block unit of the last layer runs in halves; where its FFN reads the layer's input as well, it cannot
            if (model.find(n_layer - 1, LLAMA_MOD_KIND_BLOCK) < 0 || middles.erase(n_layer - 1) == 0) {
                throw;
            }
            check_plans(middles);
        }

        auto s = whole;
        s.reserve   = false;
        s.kv_inside = false;
        s.skips     = true;
        seg         = &whole;
        params.ubatch    = ubatch1;
        params.n_outputs = 1;
        check_segment(s, params);

        fits = llm_mod_graph_can_fit(s, res->get_gf());
    } catch (const std::exception & err) {
        const std::string arch = llm_arch_name(lctx.model.arch);
        throw std::runtime_error(seg->unit < 0 ?
                format("mod: architecture '%s' cannot have these routers: %s", arch.c_str(), err.what()) :
                format("mod: layer %d of architecture '%s' cannot have a router for '%s': %s", model.units[seg->unit].layer,
                    arch.c_str(), llama_mod_kind_name(model.units[seg->unit].kind), err.what()));
    }
}

void llama_mod_context::restore_sched() {
    if (swapped) {
        std::swap(lctx.sched, swapped->sched);
        swapped = nullptr;
    }
}

void llama_mod_context::reset() {
    restore_sched();

    for (auto * plan : { &plan_cut, &plan_joined }) {
        for (auto & p : *plan) {
            p.variants.clear();
        }
    }
    skipping.clear();
    res_shared.reset();
    res_sampled = nullptr;
    res_last = nullptr;

    knows_adapters = false;
}

void llama_mod_context::before_state() {
    if (get_memory()->has_shift()) {
        lctx.synchronize();
        restore_sched();
        lctx.memory_update(false);
    }
}

llama_pos llama_mod_seq_pos_min(const llama_memory_i & mem, llama_seq_id seq_id) {
    const auto * kv = dynamic_cast<const llama_kv_cache_mod *>(&mem);
    return kv ? kv->seq_pos_fixed(seq_id) : mem.seq_pos_min(seq_id);
}

llm_mod_segment * llama_mod_context::get_segment() {
    return cur ? cur : &whole;
}

llama_kv_cache_mod * llama_mod_context::get_memory() const {
    return static_cast<llama_kv_cache_mod *>(lctx.memory.get());
}

//
// what K/V are computed with
//

static void mod_add_tensor(llama_mod_digest & digest, const ggml_tensor * t) {
    std::vector<uint8_t> data(ggml_nbytes(t));
    ggml_backend_tensor_get(t, data.data(), 0, data.size());
    digest.add(t->ne, sizeof(t->ne));
    digest.add(data.data(), data.size());
}

void llama_mod_context::digest_adapters() {
    std::vector<uint64_t> found;

    for (const auto & [lora, scale] : *lctx.loras) {
        llama_mod_digest digest;
        digest.add(scale);
        digest.add(lora->alpha);
        const std::map<std::string, llama_adapter_lora_weight> weights(lora->ab_map.begin(), lora->ab_map.end());
        for (const auto & [name, weight] : weights) {
            digest.add(name);
            mod_add_tensor(digest, weight.a);
            mod_add_tensor(digest, weight.b);
        }
        found.push_back(digest.value);
    }
    std::sort(found.begin(), found.end());

    for (int32_t il = 0; il < (int32_t) lctx.model.hparams.n_layer(); ++il) {
        if (const auto * t = lctx.cvec->tensor_for(il)) {
            llama_mod_digest digest;
            digest.add(il);
            mod_add_tensor(digest, t);
            found.push_back(digest.value);
        }
    }

    llama_mod_digest digest;
    digest.add(found.data(), found.size()*sizeof(uint64_t));
    adapters = digest.value;
}

llama_mod_origin llama_mod_context::get_origin() {
    // other adapters make the context reserve its graphs again at the next decode, which calls reset()
    if (!knows_adapters || lctx.sched_need_reserve) {
        digest_adapters();
        knows_adapters = !lctx.sched_need_reserve;
    }

    llama_mod_digest rope;
    rope.add(lctx.cparams.rope_freq_base);
    rope.add(lctx.cparams.rope_freq_scale);
    rope.add(lctx.cparams.n_ctx_orig_yarn);
    rope.add(lctx.cparams.yarn_ext_factor);
    rope.add(lctx.cparams.yarn_attn_factor);
    rope.add(lctx.cparams.yarn_beta_fast);
    rope.add(lctx.cparams.yarn_beta_slow);
    // the size of the context can choose the factors
    rope.add(lctx.model.layers[0].rope_long && lctx.model.get_rope_factors(lctx.cparams, 0) == lctx.model.layers[0].rope_long);

    llama_mod_origin res;
    res.model    = model.digest;
    res.rope     = rope.value;
    res.adapters = adapters;
    res.force    = force;
    if (force == LLAMA_MOD_FORCE_NONE) {
        res.shift      = shift;
        res.thresholds = thresholds;
    }
    return res;
}

//
// decisions
//

void llama_mod_context::set_decider() {
    decider.forced = force != LLAMA_MOD_FORCE_NONE;
    decider.n_sink = force == LLAMA_MOD_FORCE_INACTIVE ? 0 : model.n_sink;

    decider.limit.resize(n_units);
    for (int32_t u = 0; u < n_units; ++u) {
        switch (force) {
            case LLAMA_MOD_FORCE_ACTIVE:   decider.limit[u] = -INFINITY; break;
            case LLAMA_MOD_FORCE_INACTIVE: decider.limit[u] =  INFINITY; break;
            case LLAMA_MOD_FORCE_NONE:     decider.limit[u] = logit(thresholds[u]) + shift; break;
        }
    }
}

//
// a batch
//

llm_graph_result * llama_mod_context::process_ubatch(const llama_ubatch & ubatch, llm_graph_type gtype, llama_memory_context_i * mctx_i, ggml_status & ret) {
    auto * mctx = static_cast<llama_kv_cache_mod_context *>(mctx_i);

    no_slot = false;

    if (!mctx || !lctx.cparams.causal_attn) {
        LLAMA_LOG_ERROR("%s: a MoD model can only be decoded, with causal attention\n", __func__);
        ret = GGML_STATUS_FAILED;
        return nullptr;
    }
    if (ubatch.embd) {
        if (const std::string why = llama_mod_arch_refuses_embd(lctx.model); !why.empty()) {
            LLAMA_LOG_ERROR("%s: embeddings in place of tokens are not possible for a MoD model with %s\n", __func__, why.c_str());
            ret = GGML_STATUS_FAILED;
            return nullptr;
        }
    }

    bool done = false;
    try {
        done = run(ubatch, gtype, mctx, ret);
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: out of memory\n", __func__);
        reset(); // graphs may be half built
        ret = GGML_STATUS_ALLOC_FAILED;
    }
    cur = nullptr;
    if (!done) {
        return nullptr;
    }

    get_memory()->expire(mctx->is_last());
    if (mctx->is_last()) {
        commit();
    }

    ret = GGML_STATUS_SUCCESS;
    return res_last;
}

bool llama_mod_context::run(const llama_ubatch & ubatch, llm_graph_type gtype, llama_kv_cache_mod_context * mctx, ggml_status & ret) {
    if (!mctx->apply()) {
        no_slot = true; // sliding layers have no memory for the ubatch
        ret = GGML_STATUS_FAILED;
        return false;
    }

    res_last = nullptr;

    scores.assign((size_t) ubatch.n_tokens*n_units, 0.0f);
    active.assign((size_t) ubatch.n_tokens*n_units, 0);
    set_decider();

    restore_sched();
    auto params = lctx.graph_params(nullptr, ubatch, mctx, gtype);

    ret = GGML_STATUS_SUCCESS;
    const bool done = (can_skip(ubatch) && run_skipping(ubatch, params, mctx, ret)) ||
        (ret == GGML_STATUS_SUCCESS && run_pieces(ubatch, params, mctx, ret));
    if (done) {
        record(ubatch, mctx->get_n_tokens());
    }
    return done;
}

//
// what is told
//

void llama_mod_context::record(const llama_ubatch & ubatch, uint32_t n_tokens_batch) {
    batch_score .resize((size_t) n_tokens_batch*n_units);
    batch_active.resize((size_t) n_tokens_batch*n_units);

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const size_t src = (size_t) i*n_units;
        const size_t dst = (size_t) ubatch.data->batch_idxs[i]*n_units;
        for (int32_t u = 0; u < n_units; ++u) {
            batch_score [dst + u] = scores[src + u];
            batch_active[dst + u] = active[src + u];
        }
    }
}

void llama_mod_context::commit() {
    std::swap(trace_score,  batch_score);
    std::swap(trace_active, batch_active);
    batch_score .clear();
    batch_active.clear();

    const size_t n_tokens = trace_active.size()/n_units;
    for (size_t i = 0; i < n_tokens; ++i) {
        for (int32_t u = 0; u < n_units; ++u) {
            stats[u].n_seen++;
            stats[u].n_active += trace_active[i*n_units + u];
        }
    }

    perf.n_decode++;
    perf.n_tokens += n_tokens;
}

bool llama_mod_context::run_whole(const std::function<bool()> & f) {
    const auto   callback = lctx.abort_callback;
    void * const data     = lctx.abort_callback_data;

    lctx.set_abort_callback(nullptr, nullptr);
    const bool res = f();
    lctx.set_abort_callback(callback, data);

    return res;
}

int32_t llama_mod_context::fail(ggml_status status) {
    get_memory()->undo();

    batch_score .clear();
    batch_active.clear();

    if (no_slot) {
        LLAMA_LOG_WARN("%s: a layer has no free cells for the batch\n", __func__);
        return 1;
    }
    switch (status) {
        case GGML_STATUS_ABORTED:      return  2;
        case GGML_STATUS_ALLOC_FAILED: return -2;
        default:                       return -3;
    }
}
