#include "llama-mod-context.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-mod.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

// batches of up to this many tokens keep their graphs
static constexpr uint32_t MOD_N_CACHE = 4;

static float logit(float p) {
    return logf(p) - logf(1.0f - p);
}

llama_mod_context::llama_mod_context(llama_context & lctx) :
    model(*lctx.get_model().mod), lctx(lctx), n_units(model.units.size()) {

    for (const auto & u : model.units) {
        thresholds.push_back(u.threshold);
    }
    stats.resize(n_units);

    init_tensors();

    whole.kv_inside = true;
    whole.first     = true;
    whole.last      = true;
    whole.reserve   = true;
    whole.t1        = 2*lctx.model.hparams.n_layer();

    init_plan(plan_cut,    true);
    init_plan(plan_joined, false);
}

llama_mod_context::~llama_mod_context() {
    restore_sched();
}

void llama_mod_context::init_tensors() {
    const int64_t n_embd   = lctx.model.hparams.n_embd;
    const int64_t n_ubatch = lctx.cparams.n_ubatch;

    ggml_init_params ip = { 3*ggml_tensor_overhead(), nullptr, true };
    ctx.reset(ggml_init(ip));

    whole.model = &model;
    whole.h = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_ubatch);
    whole.w = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_units);
    whole.b = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_units);

    ggml_set_name(whole.h, "mod_h");
    ggml_set_name(whole.w, "mod_w");
    ggml_set_name(whole.b, "mod_b");

    // where the layers are: with several devices that of the first layer, the scheduler copies for the others
    auto * buft = ggml_backend_dev_buffer_type(lctx.model.dev_layer(0));
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (!buf) {
        throw std::runtime_error("mod: failed to allocate the residual stream");
    }

    ggml_backend_buffer_clear(buf.get(), 0);
    ggml_backend_tensor_set(whole.w, model.w.data(), 0, ggml_nbytes(whole.w));
    ggml_backend_tensor_set(whole.b, model.b.data(), 0, ggml_nbytes(whole.b));
}

void llama_mod_context::init_plan(std::vector<piece> & plan, bool cut_kv) {
    const int32_t n_layer = lctx.model.hparams.n_layer();

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

        if (u >= 0 || cut || plan.back().seg.unit >= 0) {
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
    res_shared.reset();
    res_last = nullptr;
}

llm_mod_segment * llama_mod_context::get_segment() {
    return cur ? cur : &whole;
}

llama_kv_cache_mod * llama_mod_context::get_memory() const {
    return static_cast<llama_kv_cache_mod *>(lctx.memory.get());
}

//
// decisions
//

bool llama_mod_context::is_active(int32_t u, float score, llama_pos pos) const {
    switch (force) {
        case LLAMA_MOD_FORCE_ACTIVE:   return true;
        case LLAMA_MOD_FORCE_INACTIVE: return false;
        case LLAMA_MOD_FORCE_NONE:     break;
    }
    return score >= logit(thresholds[u]) + shift || pos < (llama_pos) model.n_sink;
}

float llama_mod_context::gate_of(int32_t u, float score) const {
    // 1 where a token is active only as a sink, or because it is forced to be
    if (force != LLAMA_MOD_FORCE_NONE || !(score >= logit(thresholds[u]) + shift)) {
        return 1.0f;
    }
    return 1.0f/(1.0f + expf(-score));
}

// does no token of the batch leave the window of another one? then kv decisions can wait until the graph has run
bool llama_mod_context::can_join(const llama_ubatch & ubatch) const {
    if (model.kv_window == 0) {
        return true;
    }
    if (ubatch.n_tokens > MOD_N_CACHE) {
        return false;
    }
    const auto [lo, hi] = std::minmax_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    std::map<llama_seq_id, std::pair<llama_pos, llama_pos>> range;
    if (*hi - *lo < (llama_pos) model.kv_window) {
        return true;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            auto [it, is_new] = range.try_emplace(ubatch.seq_id[i][s], ubatch.pos[i], ubatch.pos[i]);
            it->second.first  = std::min(it->second.first,  ubatch.pos[i]);
            it->second.second = std::max(it->second.second, ubatch.pos[i]);
            if (it->second.second - it->second.first >= (llama_pos) model.kv_window) {
                return false;
            }
        }
    }
    return true;
}

//
// execution
//

// the rows of a ubatch that run a unit
static llama_ubatch ubatch_rows(const llama_ubatch & ubatch, const std::vector<int32_t> & rows) {
    auto udata = std::make_shared<llama_ubatch::data_t>();

    const uint32_t n = rows.size();

    udata->pos.resize(n*ubatch.n_pos);
    udata->seq_idx.resize(LLAMA_MAX_SEQ, -1);

    for (uint32_t i = 0; i < n; ++i) {
        const int32_t r = rows[i];

        udata->token   .push_back(ubatch.token ? ubatch.token[r] : LLAMA_TOKEN_NULL);
        udata->n_seq_id.push_back(ubatch.n_seq_id[r]);
        udata->seq_id  .push_back(ubatch.seq_id[r]);
        udata->output  .push_back(ubatch.output ? ubatch.output[r] : 0);

        for (uint32_t j = 0; j < ubatch.n_pos; ++j) {
            udata->pos[j*n + i] = ubatch.pos[j*ubatch.n_tokens + r];
        }
    }

    // one stream: which sequences take part does not change the graph
    udata->seq_id_unq.push_back(udata->seq_id[0][0]);
    udata->seq_idx[udata->seq_id_unq[0]] = 0;

    return {
        /*.b_equal_seqs =*/ 0,
        /*.n_tokens     =*/ n,
        /*.n_seq_tokens =*/ 1,
        /*.n_seqs       =*/ n,
        /*.n_seqs_unq   =*/ 1,
        /*.n_pos        =*/ ubatch.n_pos,

        /*.token        =*/ udata->token.data(),
        /*.embd         =*/ nullptr,
        /*.pos          =*/ udata->pos.data(),
        /*.n_seq_id     =*/ udata->n_seq_id.data(),
        /*.seq_id       =*/ udata->seq_id.data(),
        /*.seq_id_unq   =*/ udata->seq_id_unq.data(),
        /*.seq_idx      =*/ udata->seq_idx.data(),
        /*.output       =*/ udata->output.data(),
        /*.data         =*/ std::move(udata),
    };
}

llm_graph_result * llama_mod_context::process_ubatch(const llama_ubatch & ubatch, llm_graph_type gtype, llama_memory_context_i * mctx_i, ggml_status & ret) {
    auto * mctx = static_cast<llama_kv_cache_mod_context *>(mctx_i);

    no_slot = false;

    if (!mctx || !lctx.cparams.causal_attn) {
        LLAMA_LOG_ERROR("%s: a MoD model can only be decoded, with causal attention\n", __func__);
        ret = GGML_STATUS_FAILED;
        return nullptr;
    }
    const auto & layer_inp = lctx.cparams.embeddings_layer_inp;
    if (std::find(layer_inp.begin(), layer_inp.end(), true) != layer_inp.end()) {
        LLAMA_LOG_ERROR("%s: a MoD model does not output the inputs of its layers\n", __func__);
        ret = GGML_STATUS_FAILED;
        return nullptr;
    }
    if (!mctx->apply()) {
        LLAMA_LOG_ERROR("%s: failed to apply memory context\n", __func__);
        ret = GGML_STATUS_FAILED;
        return nullptr;
    }

    res_last = nullptr;

    scores.assign((size_t) ubatch.n_tokens*n_units, 0.0f);

    auto & plan = can_join(ubatch) ? plan_joined : plan_cut;

    // graphs of a warm-up use all experts
    const bool cache = ubatch.n_tokens <= MOD_N_CACHE && !lctx.cparams.warmup;

    restore_sched();
    auto params = lctx.graph_params(nullptr, ubatch, mctx, gtype);

    for (auto & p : plan) {
        if (!run_piece(p, ubatch, params, mctx, cache, ret)) {
            cur = nullptr;
            return nullptr;
        }
    }
    cur = nullptr;

    record(ubatch, mctx->get_n_tokens());

    get_memory()->expire(mctx->is_last());
    if (mctx->is_last()) {
        commit();
    }

    ret = GGML_STATUS_SUCCESS;
    return res_last;
}

bool llama_mod_context::run_piece(piece & p, const llama_ubatch & ubatch, llm_graph_params & params,
        llama_kv_cache_mod_context * mctx, bool cache, ggml_status & ret) {
    const int32_t unit = p.seg.unit;

    std::vector<int32_t> rows;
    for (int32_t i = 0; i < (int32_t) ubatch.n_tokens; ++i) {
        if (unit < 0 || is_active(unit, scores[(size_t) i*n_units + unit], ubatch.pos[i])) {
            rows.push_back(i);
        }
    }
    if (rows.empty()) {
        return true;
    }

    const bool all = rows.size() == ubatch.n_tokens;
    const llama_ubatch sub = all ? ubatch : ubatch_rows(ubatch, rows);

    if (!place_layers(p.seg, rows, sub, ubatch, mctx)) {
        no_slot = true;
        ret = GGML_STATUS_FAILED;
        return false;
    }

    restore_sched();

    // a head without outputs has no data at all, for which a scheduler of its own cannot allocate
    const bool keep = cache && !(p.seg.last && lctx.n_outputs == 0);

    variant * v = keep ? &get_variant(p, rows.size(), !all) : nullptr;

    auto & seg = v ? v->seg : p.seg;
    seg.gather = !all;
    seg.rows   = rows;
    seg.gate.clear();
    if (unit >= 0 && model.scale_output) {
        for (const int32_t r : rows) {
            seg.gate.push_back(gate_of(unit, scores[(size_t) r*n_units + unit]));
        }
    }

    if (v) {
        std::swap(lctx.sched, v->sched);
        swapped = v;
    }

    params.ubatch = sub;
    params.mod    = &seg;
    params.sched  = lctx.sched.get();

    bool built = false;
    if (!v && !res_shared) {
        res_shared.reset(new llm_graph_result(lctx.get_gf_res_reserve()->get_max_nodes()));
    }
    auto * res = v ? v->res.get() : res_shared.get();

    if (!compute(seg, res, v ? v->built : built, params, ret)) {
        return false;
    }

    read_scores(seg, rows);

    // decisions of kv units inside the segment
    if (seg.kv_inside && unit < 0) {
        for (const auto & o : seg.out) {
            if (model.units[o.u0].kind == LLAMA_MOD_KIND_KV && model.pos(o.u0) < seg.t1) {
                drop_layer(model.units[o.u0].layer, rows, ubatch, mctx);
            }
        }
    }

    if (seg.last) {
        res_last = res;
    }
    return true;
}

bool llama_mod_context::compute(llm_mod_segment & seg, llm_graph_result * res, bool & built, llm_graph_params & params, ggml_status & ret) {
    cur = &seg;
    params.res = res;

    perf.n_graphs++;

    if (built && !lctx.graph_reuse_disable && res->can_reuse(params)) {
        perf.n_graphs_reused++;
        lctx.n_reused += seg.last;
    } else {
        built = false;
        res->reset();

        ggml_backend_sched_reset(lctx.sched.get());
        ggml_backend_sched_set_eval_callback(lctx.sched.get(), lctx.cparams.cb_eval, lctx.cparams.cb_eval_user_data);

        auto * gf = lctx.model.build_graph(params);
        if (!ggml_backend_sched_alloc_graph(lctx.sched.get(), gf)) {
            LLAMA_LOG_ERROR("%s: failed to allocate graph\n", __func__);
            ret = GGML_STATUS_ALLOC_FAILED;
            return false;
        }
        built = true;
    }

    res->set_inputs(&params.ubatch);

    ret = lctx.graph_compute(res->get_gf(), params.ubatch.n_tokens > 1);
    if (ret != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute graph, compute status: %d\n", __func__, ret);
        return false;
    }
    return true;
}

bool llama_mod_context::place_layers(const llm_mod_segment & seg, const std::vector<int32_t> & rows, const llama_ubatch & sub,
        const llama_ubatch & ubatch, llama_kv_cache_mod_context * mctx) {
    for (int32_t il = (seg.t0 + 1)/2; 2*il < seg.t1; ++il) {
        if (!model.has_cells(il)) {
            continue;
        }
        if (!mctx->place(il, sub)) {
            return false;
        }
        // the scores are here before the layer runs, but for those inside a joined segment
        if (model.find(il, LLAMA_MOD_KIND_KV) >= 0 && !(seg.kv_inside && seg.unit < 0)) {
            drop_layer(il, rows, ubatch, mctx);
        }
    }
    return true;
}

void llama_mod_context::drop_layer(int32_t il, const std::vector<int32_t> & rows, const llama_ubatch & ubatch, llama_kv_cache_mod_context * mctx) const {
    const int32_t u = model.find(il, LLAMA_MOD_KIND_KV);

    std::vector<uint8_t> dropped;
    for (const int32_t r : rows) {
        dropped.push_back(!is_active(u, scores[(size_t) r*n_units + u], ubatch.pos[r]));
    }
    mctx->set_dropped(il, dropped);
}

void llama_mod_context::read_scores(const llm_mod_segment & seg, const std::vector<int32_t> & rows) {
    if (seg.out.empty()) {
        return;
    }

    ggml_backend_sched_synchronize(lctx.sched.get());

    std::vector<float> data;
    for (const auto & o : seg.out) {
        data.resize(ggml_nelements(o.t));
        ggml_backend_tensor_get(o.t, data.data(), 0, ggml_nbytes(o.t));
        for (size_t i = 0; i < rows.size(); ++i) {
            memcpy(&scores[(size_t) rows[i]*n_units + o.u0], &data[i*o.n], o.n*sizeof(float));
        }
    }
}

llama_mod_context::variant & llama_mod_context::get_variant(piece & p, uint32_t n_rows, bool gather) {
    auto & v = p.variants[{ n_rows, gather }];
    if (v) {
        return *v;
    }

    const size_t n_whole = lctx.get_gf_res_reserve()->get_max_nodes();
    const size_t n_half  = (96 + 3*lctx.model.hparams.n_expert_used())*(1 + lctx.loras->size());
    const size_t n_nodes = p.seg.last ? n_whole : std::min(n_whole, 64 + (p.seg.t1 - p.seg.t0)*n_half);

    v = std::make_unique<variant>();
    v->seg = p.seg;
    v->res.reset(new llm_graph_result(n_nodes));
    v->sched.reset(ggml_backend_sched_new(lctx.backend_ptrs.data(), lctx.backend_buft.data(), lctx.backend_ptrs.size(),
            n_nodes, false, lctx.cparams.op_offload));

    return *v;
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
            batch_active[dst + u] = is_active(u, scores[src + u], ubatch.pos[i]);
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

int32_t llama_mod_context::fail(ggml_status status) {
    get_memory()->undo();

    batch_score .clear();
    batch_active.clear();

    if (no_slot) {
        LLAMA_LOG_WARN("%s: a routed layer has no free cells for the batch\n", __func__);
        return 1;
    }
    switch (status) {
        case GGML_STATUS_ABORTED:      return  2;
        case GGML_STATUS_ALLOC_FAILED: return -2;
        default:                       return -3;
    }
}
