#include "llama-mod-context.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-mod.h"
#include "llama-mod-model.h"
#include "llama-model.h"

#include "ggml-mod.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_set>

// How llama_mod_context runs a ubatch.

// batches of up to this many tokens keep their graphs
static constexpr uint32_t MOD_N_CACHE = 8;

// rows that a kept graph of some of a batch's tokens has: few sizes, and at most one row too many
static uint32_t mod_pad(uint32_t n) {
    return n <= 4 ? n : n + n % 2;
}

namespace {

// adds the time of its life, in us
struct timer {
    timer(uint64_t & sum) : sum(sum), start(ggml_time_us()) {}
    ~timer() { sum += ggml_time_us() - start; }

    uint64_t & sum;
    int64_t start;
};

} // namespace

// the rows of a ubatch that run a unit; a row may occur twice
static llama_ubatch ubatch_rows(const llama_ubatch & ubatch, const std::vector<int32_t> & rows) {
    auto udata = std::make_shared<llama_ubatch::data_t>();

    const uint32_t n = rows.size();

    udata->pos.resize(n*ubatch.n_pos);

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

    // recurrent layers, where there are any, see the tokens as they were split, or they are built in vain
    const bool equal = ubatch.equal_seqs();
    const bool all   = n == ubatch.n_tokens;

    const uint32_t n_seqs = !equal ? n : all ? ubatch.n_seqs : 1;

    if (all) {
        udata->seq_id_unq.assign(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);
        udata->seq_idx   .assign(ubatch.seq_idx, ubatch.seq_idx + LLAMA_MAX_SEQ);
    } else {
        // one stream, in which every sequence is the first one: which of them take part does not change the graph
        udata->seq_id_unq.push_back(udata->seq_id[0][0]);
        udata->seq_idx   .resize(LLAMA_MAX_SEQ, 0);
    }

    return {
        /*.b_equal_seqs =*/ equal,
        /*.n_tokens     =*/ n,
        /*.n_seq_tokens =*/ n/n_seqs,
        /*.n_seqs       =*/ n_seqs,
        /*.n_seqs_unq   =*/ (uint32_t) udata->seq_id_unq.size(),
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

// is what flash attention reads a view of the cache? K and V in F32 are converted before
bool llama_mod_context::can_fit() const {
    return is_cpu && fits && lctx.cparams.flash_attn && !get_memory()->has_f32();
}

bool llama_mod_context::has_whole_units(ggml_cgraph * gf) const {
    int i_route = -1;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const auto * op = ggml_mod_get_params(ggml_graph_node(gf, i));
        if (op && op->op == GGML_MOD_OP_ROUTE) {
            i_route = i;
        }
        if (!op || op->op != GGML_MOD_OP_SCATTER) {
            continue;
        }
        auto * backend = ggml_backend_sched_get_tensor_backend(lctx.sched.get(), ggml_graph_node(gf, i_route));
        for (int j = i_route; j <= i; ++j) {
            auto * other = ggml_backend_sched_get_tensor_backend(lctx.sched.get(), ggml_graph_node(gf, j));
            if (other && other != backend) {
                return false;
            }
        }
    }
    return true;
}

// can the model run as one graph whose routers skip?
bool llama_mod_context::can_skip(const llama_ubatch & ubatch) const {
    return (is_cpu || on_device) && ubatch.n_tokens == 1 && ubatch.token && lctx.n_outputs == 1 && !lctx.cparams.warmup;
}

// does no token of the batch leave the window of another one? then kv decisions can wait until the graph has run
bool llama_mod_context::can_join(const llama_ubatch & ubatch) const {
    if (kv_window_min == 0) {
        return true;
    }
    if (ubatch.n_tokens > MOD_N_CACHE) {
        return false;
    }
    const auto [lo, hi] = std::minmax_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    if (*hi - *lo < kv_window_min) {
        return true;
    }
    std::map<llama_seq_id, std::pair<llama_pos, llama_pos>> range;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            auto [it, is_new] = range.try_emplace(ubatch.seq_id[i][s], ubatch.pos[i], ubatch.pos[i]);
            it->second.first  = std::min(it->second.first,  ubatch.pos[i]);
            it->second.second = std::max(it->second.second, ubatch.pos[i]);
            if (it->second.second - it->second.first >= kv_window_min) {
                return false;
            }
        }
    }
    return true;
}

//
// one token, one graph
//

bool llama_mod_context::run_skipping(const llama_ubatch & ubatch, llm_graph_params & params, llama_kv_cache_mod_context * mctx, ggml_status & ret) {
    const int32_t n_layer = lctx.model.hparams.n_layer();
    {
        const timer time(perf.us_slots);

        using slack = llama_kv_cache_mod::slack;
        get_memory()->set_slack(on_device ? slack::room : can_fit() ? slack::fit : slack::none);

        for (int32_t il = 0; il < n_layer; ++il) {
            for (int32_t part = 0; part < model.n_parts(il); ++part) {
                if (!mctx->reserve(il, part)) {
                    return false;
                }
            }
        }
    }

    auto & kept = skipping[get_head(whole)];
    if (!kept) {
        auto seg = whole;
        seg.reserve   = false;
        seg.kv_inside = false;
        seg.skips     = true;
        seg.on_device = on_device;
        kept = make_variant(seg, lctx.graph_max_nodes(1));
    }

    auto & seg = kept->seg;
    seg.decider = &decider;
    seg.pos     = ubatch.pos[0];
    seg.score   = scores.data();
    seg.active  = active.data();

    params.ubatch = ubatch;
    if (!compute(kept.get(), seg, params, ret)) {
        if (seg.on_device && !on_device) {
            restore_sched();
            skipping.clear();
        }
        return false;
    }
    if (on_device) {
        read_routes(seg);
    } else {
        ggml_backend_sched_synchronize(lctx.sched.get());
    }
    {
        const timer time(perf.us_slots);

        const auto is_active = [&](int32_t u) { return u < 0 || active[u]; };

        for (int32_t il = 0; il < n_layer; ++il) {
            if (!model.has_cells(il) || !is_active(model.find(il, LLAMA_MOD_KIND_BLOCK)) || !is_active(model.find(il, LLAMA_MOD_KIND_ATTN))) {
                continue;
            }
            for (int32_t part = 0; part < model.n_parts(il); ++part) {
                mctx->occupy(il, part, !is_active(model.find_kv(il, part)));
            }
        }
    }

    res_last = kept->res.get();
    return true;
}

void llama_mod_context::read_routes(const llm_mod_segment & seg) {
    const timer time(perf.us_read);

    outputs.reset();

    // of each unit: the number of active tokens, their index, score, gate
    const auto * data = (const int32_t *) outputs.read(get_backend(lctx.model.dev_layer(0)), seg.routes);
    ggml_backend_sched_synchronize(lctx.sched.get());

    for (int32_t u = 0; u < n_units; ++u) {
        active[u] = data[4*u] > 0;
        memcpy(&scores[u], &data[4*u + 2], sizeof(float));
    }
}

//
// segment by segment
//

bool llama_mod_context::run_pieces(const llama_ubatch & ubatch, llm_graph_params & params, llama_kv_cache_mod_context * mctx, ggml_status & ret) {
    auto & plan = can_join(ubatch) ? plan_joined : plan_cut;

    // graphs of a warm-up use all experts
    const bool cache = ubatch.n_tokens <= MOD_N_CACHE && !lctx.cparams.warmup;

    for (auto & p : plan) {
        if (!run_piece(p, ubatch, params, mctx, cache, ret)) {
            return false;
        }
    }
    return true;
}

bool llama_mod_context::run_piece(piece & p, const llama_ubatch & ubatch, llm_graph_params & params,
        llama_kv_cache_mod_context * mctx, bool cache, ggml_status & ret) {
    const int32_t unit = p.seg.unit;

    // a head without outputs has no data at all, for which a scheduler of its own cannot allocate;
    // a graph has room for a copy of each row's recurrent states, megabytes: for several rows the context's room is taken
    const bool keep = cache && !(p.seg.last && lctx.n_outputs == 0) && !(ubatch.n_tokens > 1 && has_states(p.seg));

    std::vector<int32_t> rows, rows_in, rows_out;
    llama_ubatch sub;
    bool all;
    {
        const timer time(perf.us_route);

        // nobody reads what the last FFN does for tokens that are not output
        const bool out_only = unit >= 0 && p.seg.t0 > 2*((int32_t) lctx.model.hparams.n_layer() - 1);

        for (int32_t i = 0; i < (int32_t) ubatch.n_tokens; ++i) {
            if (unit < 0 || (active[(size_t) i*n_units + unit] && (!out_only || ubatch.output[i]))) {
                rows.push_back(i);
            }
        }
        if (rows.empty()) {
            return true;
        }
        all = rows.size() == ubatch.n_tokens;

        rows_in  = rows;
        rows_out = rows;
        if (keep && !all) {
            rows_in .resize(mod_pad(rows.size()), rows.back());
            rows_out.resize(rows_in.size(), lctx.cparams.n_ubatch);
        }
        // embeddings in place of tokens are for the first segment
        sub = all && (p.seg.first || ubatch.token) ? ubatch : ubatch_rows(ubatch, rows_in);
    }
    {
        const timer time(perf.us_slots);

        if (!place_layers(p.seg, rows, sub, mctx)) {
            no_slot = true;
            ret = GGML_STATUS_FAILED;
            return false;
        }
    }

    restore_sched();

    variant * v = keep ? &get_variant(p, sub.n_tokens, !all) : nullptr;

    auto & seg = v ? v->seg : p.seg;
    seg.gather   = !all;
    seg.rows     = std::move(rows_in);
    seg.rows_out = std::move(rows_out);
    seg.gate.clear();
    if (unit >= 0 && model.scale_output) {
        for (const int32_t r : seg.rows) {
            seg.gate.push_back(decider.gate(unit, scores[(size_t) r*n_units + unit]));
        }
    }

    params.ubatch = sub;
    if (!compute(v, seg, params, ret)) {
        return false;
    }

    read_scores(seg, rows, ubatch);

    // decisions of kv units inside the segment
    if (seg.kv_inside && unit < 0) {
        const timer time(perf.us_slots);

        for (const auto & o : seg.out) {
            if (model.units[o.u0].kind == LLAMA_MOD_KIND_KV && model.pos(o.u0) < seg.t1) {
                const int32_t il = model.units[o.u0].layer;
                for (int32_t part = 0; part < model.n_parts(il); ++part) {
                    mctx->set_dropped(il, part, get_dropped(il, part, rows));
                }
            }
        }
    }
    {
        const timer time(perf.us_slots);

        for (int32_t il = (seg.t0 + 1)/2; 2*il < seg.t1; ++il) {
            for (int32_t part = 0; part < model.n_parts(il); ++part) {
                mctx->settle(il, part);
            }
        }
    }

    if (seg.last) {
        res_last = v ? v->res.get() : res_shared.get();
    }
    return true;
}

bool llama_mod_context::place_layers(const llm_mod_segment & seg, const std::vector<int32_t> & rows, const llama_ubatch & sub,
        llama_kv_cache_mod_context * mctx) {
    for (int32_t il = (seg.t0 + 1)/2; 2*il < seg.t1; ++il) {
        if (!model.has_cells(il)) {
            continue;
        }

        for (int32_t part = 0; part < model.n_parts(il); ++part) {
            // the scores are here before the layer runs, but for those inside a joined segment
            std::vector<uint8_t> dropped;
            if (model.find(il, LLAMA_MOD_KIND_KV) >= 0 && !(seg.kv_inside && seg.unit < 0)) {
                dropped = get_dropped(il, part, rows);
                dropped.resize(sub.n_tokens);
            }
            if (!mctx->place(il, part, sub, dropped)) {
                return false;
            }
            // rows that only fill up need a cell to write to, and nobody sees it
            mctx->take_back(il, part, rows.size());
        }
    }
    return true;
}

std::vector<uint8_t> llama_mod_context::get_dropped(int32_t il, int32_t part, const std::vector<int32_t> & rows) const {
    const int32_t u = model.find_kv(il, part);

    std::vector<uint8_t> dropped(rows.size());
    for (size_t i = 0; i < rows.size() && u >= 0; ++i) {
        dropped[i] = !active[(size_t) rows[i]*n_units + u];
    }
    return dropped;
}

void llama_mod_context::read_scores(const llm_mod_segment & seg, const std::vector<int32_t> & rows, const llama_ubatch & ubatch) {
    if (seg.out.empty()) {
        return;
    }

    const timer time(perf.us_read);

    outputs.reset();

    std::map<const ggml_tensor *, const float *> found;
    for (const auto & o : seg.out) {
        if (auto & data = found[o.t]; !data) {
            data = (const float *) outputs.read(ggml_backend_sched_get_tensor_backend(lctx.sched.get(), o.t), o.t);
        }
    }
    ggml_backend_sched_synchronize(lctx.sched.get());

    for (const auto & o : seg.out) {
        const auto  * data = found[o.t] + o.i;
        const int64_t step = o.t->ne[0];
        for (size_t i = 0; i < rows.size(); ++i) {
            const size_t at = (size_t) rows[i]*n_units;
            for (int32_t j = 0; j < o.n; ++j) {
                scores[at + o.u0 + j] = data[i*step + j];
                active[at + o.u0 + j] = decider.active(o.u0 + j, data[i*step + j], ubatch.pos[rows[i]]);
            }
        }
    }
}

//
// graphs
//

std::unique_ptr<llama_mod_context::variant> llama_mod_context::make_variant(const llm_mod_segment & seg, size_t n_nodes) const {
    auto v = std::make_unique<variant>();
    v->seg = seg;
    v->res.reset(new llm_graph_result(n_nodes));
    v->sched.reset(ggml_backend_sched_new(lctx.backend_ptrs.data(), lctx.backend_buft.data(), lctx.backend_ptrs.size(),
            n_nodes, false, lctx.cparams.op_offload));
    if (auto * backend = get_input_backend(seg)) {
        v->inputs = std::make_unique<llama_mod_inputs>(backend);
    }

    return v;
}

ggml_backend_t llama_mod_context::get_backend(ggml_backend_dev_t dev) const {
    for (auto * backend : lctx.backend_ptrs) {
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return nullptr;
}

ggml_backend_t llama_mod_context::get_input_backend(const llm_mod_segment & seg) const {
    const int32_t last = (int32_t) lctx.model.hparams.n_layer() - 1;

    auto * dev = lctx.model.dev_layer(std::min(seg.t0/2, last));
    for (int32_t il = seg.t0/2; 2*il < seg.t1; ++il) {
        if (lctx.model.dev_layer(il) != dev) {
            return nullptr;
        }
    }
    const bool is_host = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;

    return inputs == io::block || (inputs == io::unset && !is_host) ? get_backend(dev) : nullptr;
}

bool llama_mod_context::has_states(const llm_mod_segment & seg) const {
    const auto * recr = get_memory()->get_recr();
    for (int32_t il = (seg.t0 + 1)/2; recr && 2*il < seg.t1; ++il) {
        if (recr->has(il)) {
            return true;
        }
    }
    return false;
}

uint32_t llama_mod_context::get_head(const llm_mod_segment & seg) const {
    return has_states(seg) ? get_memory()->get_recr()->get_context(false)->get_head() : 0;
}

llama_mod_context::variant & llama_mod_context::get_variant(piece & p, uint32_t n_rows, bool gather) {
    auto & v = p.variants[{ n_rows, gather, get_head(p.seg) }];
    if (!v) {
        const size_t n_whole = lctx.get_gf_res_reserve()->get_max_nodes();

        v = make_variant(p.seg, std::min(n_whole, 64 + p.n_tensors*(1 + lctx.loras->size())));
    }
    return *v;
}

bool llama_mod_context::compute(variant * v, llm_mod_segment & seg, llm_graph_params & params, ggml_status & ret) {
    if (v) {
        std::swap(lctx.sched, v->sched);
        swapped = v;

        const uint64_t generation = get_memory()->get_generation();
        v->built      = v->built && v->generation == generation;
        v->generation = generation;
    } else if (!res_shared) {
        res_shared.reset(new llm_graph_result(lctx.get_gf_res_reserve()->get_max_nodes()));
    }
    auto * res = v ? v->res.get() : res_shared.get();

    cur = &seg;
    params.mod   = &seg;
    params.sched = lctx.sched.get();
    params.res   = res;

    params.cparams.embeddings_layer_inp = find_layer_inputs(seg);
    read_stream(seg, params.ubatch.n_tokens);

    perf.n_graphs++;
    perf.n_graphs_small += v != nullptr;

    const bool sampled = !seg.last || params.samplers.empty() || res == res_sampled;

    if (v && v->built && !lctx.graph_reuse_disable && sampled && res->can_reuse(params)) {
        perf.n_graphs_reused++;
        lctx.n_reused += seg.last;
    } else if (!build(v, res, params, ret)) {
        return false;
    }
    {
        const timer time(perf.us_inputs);

        if (v && v->inputs) {
            // between devices the scheduler copies behind the backends' backs
            const bool wait = ggml_backend_sched_get_n_splits(lctx.sched.get()) > 1;
            v->inputs->fill([&] { res->set_inputs(&params.ubatch); }, wait);
        } else {
            res->set_inputs(&params.ubatch);
        }
    }
    const timer time(perf.us_compute);

    ret = lctx.graph_compute(res->get_gf(), params.ubatch.n_tokens > 1);
    if (ret != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute graph, compute status: %d\n", __func__, ret);
        return false;
    }
    read_layer_inputs(params);

    return true;
}

bool llama_mod_context::bind_unread(const llm_graph_result & res) {
    std::unordered_set<const ggml_tensor *> read;

    auto * gf = res.get_gf();
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        for (const auto * src : ggml_graph_node(gf, i)->src) {
            const auto * t = src && src->view_src ? src->view_src : src;
            if (t && (t->flags & GGML_TENSOR_FLAG_INPUT)) {
                read.insert(t);
            }
        }
    }

    for (auto * t = ggml_get_first_tensor(res.get_ctx()); t; t = ggml_get_next_tensor(res.get_ctx(), t)) {
        if (!(t->flags & GGML_TENSOR_FLAG_INPUT) || t->op != GGML_OP_NONE || t->buffer || t->view_src || read.count(t) > 0) {
            continue;
        }
        // kept graphs hold on to it, so it is never replaced
        if (unread.empty() || ggml_backend_buffer_get_size(unread.back().get()) < ggml_nbytes(t)) {
            const size_t n_max = sizeof(float)*lctx.cparams.n_ubatch*lctx.model.hparams.n_embd_inp();
            auto * buf = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), std::max(ggml_nbytes(t), n_max));
            if (!buf) {
                return false;
            }
            unread.emplace_back(buf);
        }
        ggml_backend_tensor_alloc(unread.back().get(), t, ggml_backend_buffer_get_base(unread.back().get()));
    }
    return true;
}

bool llama_mod_context::build(variant * v, llm_graph_result * res, llm_graph_params & params, ggml_status & ret) {
    const timer time(perf.us_build);

    if (v) {
        perf.n_graphs_resized += v->built;
        v->built = false;
    }

    res->reset();

    ggml_backend_sched_reset(lctx.sched.get());
    ggml_backend_sched_set_eval_callback(lctx.sched.get(), lctx.cparams.cb_eval, lctx.cparams.cb_eval_user_data);

    auto * gf = lctx.model.build_graph(params);
    res->set_outputs(params);
    if (!bind_unread(*res) || (v && v->inputs && !v->inputs->place(gf)) || !ggml_backend_sched_alloc_graph(lctx.sched.get(), gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate graph\n", __func__);
        ret = GGML_STATUS_ALLOC_FAILED;
        return false;
    }

    if (v && v->seg.on_device && !has_whole_units(gf)) {
        LLAMA_LOG_WARN("%s: one graph for a token would be cut inside a unit: segments instead\n", __func__);
        on_device = false;
        return false;
    }
    if (cur->last && !params.samplers.empty()) {
        res_sampled = res;
    }

    if (v) {
        v->built = true;
        if (can_fit() && !v->seg.on_device) {
            llm_mod_graph_fit(v->seg, gf);
        }
    }
    return true;
}
