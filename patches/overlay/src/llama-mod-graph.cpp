#include "llama-mod-graph.h"

#include "llama-impl.h"
#include "llama-kv-cache-mod.h"
#include "llama-mod-arch.h"
#include "llama-mod-model.h"

#include "ggml-mod.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

float llama_mod_decider::gate(int32_t u, float score) const {
    return forced || !(score >= limit[u]) ? 1.0f : 1.0f/(1.0f + expf(-score));
}

// which rows of h a unit's segment runs on, and their gates
class llm_graph_input_mod_rows : public llm_graph_input_i {
public:
    llm_graph_input_mod_rows(const llm_mod_segment * seg) : seg(seg) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (rows) {
            GGML_ASSERT(seg->rows.size() == ubatch->n_tokens);
            ggml_backend_tensor_set(rows, seg->rows.data(), 0, ggml_nbytes(rows));
        }
        if (rows_out) {
            GGML_ASSERT(seg->rows_out.size() == ubatch->n_tokens);
            ggml_backend_tensor_set(rows_out, seg->rows_out.data(), 0, ggml_nbytes(rows_out));
        }
        if (gate) {
            GGML_ASSERT(seg->gate.size() == ubatch->n_tokens);
            ggml_backend_tensor_set(gate, seg->gate.data(), 0, ggml_nbytes(gate));
        }
        GGML_UNUSED(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        // the number of rows is that of the ubatch, which allow_reuse() compares
        return params.mod == seg && (rows != nullptr) == seg->gather;
    }

    ggml_tensor * rows     = nullptr; // I32 [n_tokens]
    ggml_tensor * rows_out = nullptr; // I32 [n_tokens]
    ggml_tensor * gate     = nullptr; // F32 [1, n_tokens]

    const llm_mod_segment * seg;
};

// what the routers of a graph on a device need to decide about its token
class llm_graph_input_mod_decider : public llm_graph_input_i {
public:
    llm_graph_input_mod_decider(const llm_mod_segment * seg) : seg(seg) {}

    void set_input(const llama_ubatch * ubatch) override {
        const int32_t is_sink = ubatch->pos[0] < seg->decider->n_sink;

        ggml_backend_tensor_set(limit,  seg->decider->limit.data(), 0, ggml_nbytes(limit));
        ggml_backend_tensor_set(always, &is_sink,                   0, ggml_nbytes(always));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.mod == seg;
    }

    ggml_tensor * limit  = nullptr; // F32 [n_units]
    ggml_tensor * always = nullptr; // I32 [1]

    const llm_mod_segment * seg;
};

// the cache of one layer, or of one of its K/V heads: as usual, but the mask is kept up to date by the cache, and hides what kv units dropped
class llm_graph_input_attn_mod : public llm_graph_input_attn_kv {
public:
    llm_graph_input_attn_mod(const llama_hparams & hparams, const llama_cparams & cparams,
            const llama_kv_cache_mod_context * mctx_mod, int il, int part) :
        llm_graph_input_attn_kv(hparams, cparams, mctx_mod->get_layer(il, part)), mctx_mod(mctx_mod), il(il), part(part) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (!fitted.empty()) {
            fit(mctx_mod->get_n_used(il, part));
        }

        const int32_t cell = mctx_mod->get_cell(il, part);
        if (cell >= 0) {
            set_cell(cell);
        } else {
            mctx->set_input_k_idxs(self_k_idxs, ubatch);
            if (self_v_idxs) {
                mctx->set_input_v_idxs(self_v_idxs, ubatch);
            }
        }
        mctx_mod->fill_mask(self_kq_mask, *ubatch, il, part);

        if (k_rot && k_rot->buffer) {
            mctx->set_input_k_rot(k_rot);
        }
        if (v_rot && v_rot->buffer) {
            mctx->set_input_v_rot(v_rot);
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx_mod = static_cast<const llama_kv_cache_mod_context *>(params.mctx);
        mctx     = mctx_mod->get_layer(il, part);

        return self_k_idxs->ne[0]  == params.ubatch.n_tokens &&
               self_kq_mask->ne[1] == params.ubatch.n_tokens &&
               n_kv >= mctx_mod->get_n_used(il, part) && (!fitted.empty() || n_kv <= mctx->get_n_kv());
    }

    // where the one token's K and V go; a transposed V has a place for each of its values
    void set_cell(int64_t cell) {
        const int64_t size = mctx_mod->get_kv()->get_own(il, part)->get_size();

        *(int64_t *) self_k_idxs->data = cell;
        for (int64_t j = 0; self_v_idxs && j < self_v_idxs->ne[0]; ++j) {
            ((int64_t *) self_v_idxs->data)[j] = j*size + cell;
        }
    }

    // the attention nodes' own views of K, V and the mask: their strides stay as they are
    void fit(int64_t n) {
        for (auto * node : fitted) {
            node->src[1]->ne[1] = n;
            node->src[2]->ne[1] = n;
        }
        self_kq_mask->ne[0] = n;
    }

    const llama_kv_cache_mod_context * mctx_mod;
    const int il;
    const int part;

    uint32_t n_kv = 0; // cells that the graph was built for

    // self_k_rot and self_v_rot, of the first layer that has them; null in the others that share them
    ggml_tensor * k_rot = nullptr;
    ggml_tensor * v_rot = nullptr;

    std::vector<ggml_tensor *> fitted;
};

// where the states of a segment's recurrent layers are read from. T: upstream's input for hybrid models
template <typename T> class llm_graph_input_hybrid_mod : public T {
public:
    llm_graph_input_hybrid_mod(const llama_cparams & cparams, std::unique_ptr<llm_graph_input_rs> rs, const llama_mod_recurrent & recr, bool used) :
        T(cparams, nullptr, std::move(rs), nullptr), recr(recr), used(used) {}

    void set_input(const llama_ubatch * /*ubatch*/) override {
        if (used) {
            ggml_backend_tensor_set(this->inp_rs->s_copy, recr.get_copies().data(), 0, ggml_nbytes(this->inp_rs->s_copy));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        const auto & rs = *this->inp_rs;

        // views of the states depend on it all
        return !used || (
            rs.s_copy->ne[0]      == rs.mctx->get_n_rs() &&
            rs.s_copy_main->ne[0] == params.ubatch.n_seqs &&
            rs.head               == rs.mctx->get_head() &&
            rs.rs_z               == rs.mctx->get_rs_z());
    }

    const llama_mod_recurrent & recr;
    const bool used; // else the graph reads no state
};

// the attention nodes that read views of the cache: K and V in F32 are converted before
static std::multimap<const ggml_tensor *, ggml_tensor *> mod_attn_nodes(ggml_cgraph * gf) {
    std::multimap<const ggml_tensor *, ggml_tensor *> res; // by mask
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        auto * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_FLASH_ATTN_EXT && node->src[1]->op == GGML_OP_PERMUTE && node->src[2]->op == GGML_OP_PERMUTE) {
            res.insert({ node->src[3], node });
        }
    }
    return res;
}

void llm_mod_graph_fit(llm_mod_segment & seg, ggml_cgraph * gf) {
    const auto nodes = mod_attn_nodes(gf);
    for (auto * inp : seg.attn) {
        const auto [begin, end] = nodes.equal_range(inp->self_kq_mask);
        for (auto it = begin; it != end; ++it) {
            inp->fitted.push_back(it->second);
        }
        GGML_ASSERT(!inp->fitted.empty()); // else it would read cells that have no memory
    }
}

bool llm_mod_graph_can_fit(const llm_mod_segment & seg, ggml_cgraph * gf) {
    const auto nodes = mod_attn_nodes(gf);

    size_t n = 0;
    for (const auto * inp : seg.attn) {
        if (nodes.count(inp->self_kq_mask) == 0) {
            return false;
        }
        n += nodes.count(inp->self_kq_mask);
    }
    return n == nodes.size();
}

std::set<const ggml_tensor *> llm_mod_graph_attn_inputs(const llm_mod_segment & seg) {
    std::set<const ggml_tensor *> res;
    for (const auto * inp : seg.attn) {
        for (const auto * t : { inp->self_k_idxs, inp->self_v_idxs, inp->self_kq_mask, inp->self_k_rot, inp->self_v_rot }) {
            res.insert(t);
        }
    }
    return res;
}

//
// decisions inside a graph
//

// dst: F32 [1], the gate of the unit; src[0]: F32 [n_embd], h
static void mod_route(ggml_tensor * dst, int ith, int /*nth*/, void * data) {
    if (ith != 0) {
        return; // the barrier after the node orders the switches for the other threads
    }

    auto * r   = (llm_mod_router *) data;
    auto & seg = *r->seg;

    const float * h = (const float *) dst->src[0]->data;
    const int64_t n = dst->src[0]->ne[0];

    const float scale = ggml_mod_rms_scale(h, n, seg.eps);

    for (; r; r = r->next) {
        for (int32_t u = r->u0; u < r->u1; ++u) {
            seg.score [u] = ggml_mod_logit(h, scale, seg.model->w.data() + u*n, seg.model->b[u], n);
            seg.active[u] = seg.decider->active(u, seg.score[u], seg.pos);
        }
        if (r->unit < 0) {
            break;
        }

        *(float *) r->self->data = seg.decider->gate(r->unit, seg.score[r->unit]);

        r->set(seg.active[r->unit]);
        if (r->next) {
            r->next->set_self(seg.active[r->unit]);
        }
        if (seg.active[r->unit]) {
            break;
        }
    }
}

static void mod_switch(ggml_tensor * node, bool on) {
    node->flags = on ? node->flags | GGML_TENSOR_FLAG_COMPUTE : node->flags & ~GGML_TENSOR_FLAG_COMPUTE;
}

void llm_mod_router::set(bool on) {
    // all alike
    if (nodes.empty() || ((nodes[0]->flags & GGML_TENSOR_FLAG_COMPUTE) != 0) == on) {
        return;
    }
    for (auto * node : nodes) {
        mod_switch(node, on);
    }
}

void llm_mod_router::set_self(bool on) {
    mod_switch(self, on);
}

//
// llm_mod_graph
//

bool operator<(int & il, const llm_mod_layers & layers) {
    return layers.seg ? layers.seg->graph->next_layer(il) : il < layers.n;
}

llm_mod_graph::llm_mod_graph(llm_graph_context & g) : g(g), seg(g.mod), gf(g.gf),
    middle(llama_mod_arch_middle(g.arch)), end(llama_mod_arch_end(g.arch)) {
    seg->graph = this;
    seg->out.clear();
    seg->attn.clear();
    seg->routers.clear();
    seg->middles.clear();

    next_cut(seg->t0);

    ggml_graph_clear(seg->scratch);
    if (replaces(seg->t0)) {
        g.gf = seg->scratch;
    }
}

bool llm_mod_graph::next_layer(int & il) {
    if (!is_looping) {
        is_looping = true;
        is_reading = true;
        n_before   = ggml_used_mem(g.ctx0);
        il         = seg->t0/2;
    }
    return il < (seg->t1 + 1)/2;
}

void llm_mod_graph::read(ggml_tensor * cur) {
    if (is_reading) {
        is_reading = false;
        const int32_t il = seg->t0/2;
        if (acts(2*il)) {
            in_place(cur, 2*il);
        }
        if (is_ffn(il)) {
            at_middle(cur, il);
        }
    }
}

bool llm_mod_graph::is_ffn(int32_t il) const {
    return il < g.n_layer && llama_mod_arch_is_ffn(g.arch, g.hparams, il);
}

void llm_mod_graph::at_middle(ggml_tensor * cur, int32_t il) {
    if (seg->reserve) {
        seg->middles.insert(il);
    }
    if (acts(2*il + 1)) {
        in_place(cur, 2*il + 1);
    }
}

bool llm_mod_graph::name(ggml_tensor * cur, const char * name, int il) {
    if (il >= 0 && middle && strcmp(name, middle) == 0) {
        at_middle(cur, il);
    }
    if (il >= 0 && end && strcmp(name, end) == 0) {
        if (!middle && !is_ffn(il)) {
            at_middle(cur, il);
        }
        if (acts(2*il + 2)) {
            in_place(cur, 2*il + 2);
        }
        if (is_ffn(il + 1)) {
            at_middle(cur, il + 1);
        }
    }
    return is_live() || il < 0 || cur == last;
}

ggml_tensor * llm_mod_graph::leave_layer(ggml_tensor * cur, int il) {
    return acts(2*il + 2) && !end ? cut(cur, 2*il + 2) : cur;
}

bool llm_mod_graph::has_out_ids() const {
    // a graph that skips is of one token, and that one is output
    return seg->last && !seg->skips && seg->t0 <= 2*(g.n_layer - 1);
}

bool llm_mod_graph::acts(int32_t t) const {
    if (t < seg->t0 || t > seg->t1) {
        return false;
    }
    if ((t == seg->t0 && !seg->first) || (t == seg->t1 && !seg->last)) {
        return true;
    }
    if (seg->skips) {
        return replaces(t) || (t < seg->t1 && seg->model->first(t) < seg->model->first(t + 1));
    }
    return scores_kv(t);
}

bool llm_mod_graph::scores_kv(int32_t t) const {
    return seg->kv_inside && seg->unit < 0 && t % 2 == 0 && t < seg->t1 && seg->model->find(t/2, LLAMA_MOD_KIND_KV) >= 0;
}

bool llm_mod_graph::replaces(int32_t t) const {
    if (t == seg->t0 && !seg->first) {
        return true;
    }

    // a unit that begins or ends
    const auto & model = *seg->model;
    const auto has = [&](int32_t il, llama_mod_kind kind) { return model.find(il, kind) >= 0; };

    return seg->skips && (t % 2 == 1 ?
        has(t/2, LLAMA_MOD_KIND_ATTN) || has(t/2, LLAMA_MOD_KIND_FFN) :
        has(t/2, LLAMA_MOD_KIND_ATTN) || has(t/2, LLAMA_MOD_KIND_BLOCK) || has(t/2 - 1, LLAMA_MOD_KIND_FFN) || has(t/2 - 1, LLAMA_MOD_KIND_BLOCK));
}

ggml_tensor * llm_mod_graph::cut(ggml_tensor * cur, int32_t t) {
    if (t != t_next || cur->type != GGML_TYPE_F32 || cur->ne[0] != g.n_embd || ggml_nrows(cur) != cur->ne[1]) {
        throw std::runtime_error(format("the residual stream of layer %d is not where it is in other architectures", t/2));
    }

    if (t > seg->t0) {
        cur = build_leave(cur, t - 1);
    } else {
        g.gf = gf;
        cur  = seg->first ? cur : build_inp();
    }

    if (t < seg->t1) {
        cur = build_enter(cur, t);
    } else if (!seg->last) {
        build_end(cur);
        g.gf = seg->scratch;
        last = cur;
    }

    next_cut(t + 1);

    return cur;
}

void llm_mod_graph::next_cut(int32_t t) {
    while (t <= seg->t1 && !acts(t)) {
        ++t;
    }
    t_next = t;
    seg->is_whole = t > seg->t1;
}

void llm_mod_graph::in_place(ggml_tensor * cur, int32_t t) {
    if (!replaces(t)) {
        cut(cur, t);
        return;
    }

    // the node moves into another tensor
    ggml_tensor * old = ggml_new_tensor(g.ctx0, cur->type, GGML_MAX_DIMS, cur->ne);
    *old = *cur;

    // with it what was made of it before the loop
    const auto * end = (const char *) ggml_get_mem_buffer(g.ctx0) + n_before;
    for (auto * x = ggml_get_first_tensor(g.ctx0); x && (const char *) x < end; x = ggml_get_next_tensor(g.ctx0, x)) {
        for (auto & src : x->src) {
            src = src == cur ? old : src;
        }
        x->view_src = x->view_src == cur ? old : x->view_src;
    }

    const ggml_tensor * res = cut(old, t);
    GGML_ASSERT(res != old);
    *cur = *res;
    if (inp_cur == res) {
        inp_cur = cur;
    }
}

ggml_tensor * llm_mod_graph::build_inp() {
    if (seg->unit >= 0) {
        auto inp = std::make_unique<llm_graph_input_mod_rows>(seg);

        if (seg->gather) {
            inp->rows = inp_rows = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_tokens);
            ggml_set_input(inp_rows);
            ggml_set_name(inp_rows, "mod_rows");

            inp->rows_out = inp_rows_out = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_tokens);
            ggml_set_input(inp_rows_out);
            ggml_set_name(inp_rows_out, "mod_rows_out");
        }
        if (!seg->gate.empty()) {
            inp->gate = inp_gate = ggml_new_tensor_2d(g.ctx0, GGML_TYPE_F32, 1, g.n_tokens);
            ggml_set_input(inp_gate);
            ggml_set_name(inp_gate, "mod_gate");
        }

        g.res->add_input(std::move(inp));
    }

    if (seg->gather) {
        inp_cur = ggml_get_rows(g.ctx0, seg->h, inp_rows);
    } else {
        inp_cur = view_h();
    }
    g.cb(inp_cur, "mod_inp", -1);

    // the last layer's attention comes no more, with which an architecture leaves all rows that are not output
    return seg->last && seg->t0 > 2*(g.n_layer - 1) ? build_out_rows(inp_cur) : inp_cur;
}

ggml_tensor * llm_mod_graph::build_out_rows(ggml_tensor * cur) {
    auto inp = std::make_unique<llm_graph_input_out_ids>(g.hparams, g.cparams, g.n_outputs);

    inp->out_ids = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_outputs);
    ggml_set_input(inp->out_ids);
    ggml_set_name(inp->out_ids, "out_ids");

    cur = ggml_get_rows(g.ctx0, cur, inp->out_ids);

    g.res->add_input(std::move(inp));

    return cur;
}

ggml_tensor * llm_mod_graph::view_h() const {
    return ggml_view_2d(g.ctx0, seg->h, g.n_embd, g.n_tokens, seg->h->nb[1], 0);
}

ggml_tensor * llm_mod_graph::build_enter(ggml_tensor * cur, int32_t t) {
    if (seg->skips) {
        const int32_t u0 = seg->model->first(t);
        const int32_t u1 = seg->model->first(t + 1);
        return u0 < u1 ? build_router(cur, u0, u1) : cur;
    }
    if (scores_kv(t)) {
        const int32_t u = seg->model->find(t/2, LLAMA_MOD_KIND_KV);
        build_scores(cur, t/2, u, u + seg->model->n_kv(t/2));
    }
    return cur;
}

ggml_tensor * llm_mod_graph::build_leave(ggml_tensor * cur, int32_t t) {
    if (route && t == t_leave) {
        ggml_build_forward_expand(gf, ggml_mod_scatter(g.ctx0, view_h(), cur, route, route_unit));
        route = nullptr;

        return view_h();
    }
    if (!router || t != t_leave) {
        return cur;
    }

    // what the unit adds goes into h, where it is found missing if the unit is skipped
    ggml_build_forward_expand(gf, ggml_cpy(g.ctx0, build_gated(cur), view_h()));

    for (int i = i_node; i < ggml_graph_n_nodes(gf); ++i) {
        router->nodes.push_back(ggml_graph_node(gf, i));
    }
    left     = router;
    router   = nullptr;
    inp_gate = nullptr;

    return view_h();
}

template <typename T> T * llm_mod_graph::build_inp_hybrid(const llama_ubatch & ubatch) {
    const auto * mctx = static_cast<const llama_kv_cache_mod_context *>(g.mctx);
    const auto & recr = *mctx->get_kv()->get_recr();

    auto rs = std::make_unique<llm_graph_input_rs>(recr.get_context(mctx->is_full()));

    const int64_t n_rs = rs->mctx->get_n_rs();
    rs->head = rs->mctx->get_head();
    rs->rs_z = rs->mctx->get_rs_z();

    rs->s_copy = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, n_rs);
    ggml_set_input(rs->s_copy);
    ggml_set_name(rs->s_copy, "mod_s_copy");

    rs->s_copy_main  = ggml_view_1d(g.ctx0, rs->s_copy, ubatch.n_seqs, 0);
    rs->s_copy_extra = ggml_view_1d(g.ctx0, rs->s_copy, n_rs - ubatch.n_seqs, ubatch.n_seqs*rs->s_copy->nb[0]);

    bool used = false;
    for (int32_t il = (seg->t0 + 1)/2; 2*il < seg->t1; ++il) {
        used = used || recr.has(il);
    }
    return static_cast<T *>(g.res->add_input(std::make_unique<llm_graph_input_hybrid_mod<T>>(g.cparams, std::move(rs), recr, used)));
}

template llm_graph_input_mem_hybrid      * llm_mod_graph::build_inp_hybrid(const llama_ubatch & ubatch);
template llm_graph_input_mem_hybrid_k    * llm_mod_graph::build_inp_hybrid(const llama_ubatch & ubatch);
template llm_graph_input_mem_hybrid_iswa * llm_mod_graph::build_inp_hybrid(const llama_ubatch & ubatch);

// K and V that are quantised are rotated before, by a matrix that layers with heads of the same size have in common
static ggml_tensor * share_rot(ggml_tensor * & shared, ggml_tensor * & own) {
    if (!own || !shared || own->ne[0] != shared->ne[0]) {
        shared = own;
        return own;
    }
    own = nullptr;
    return shared;
}

bool llm_mod_graph::attend(llm_graph_input_attn_kv * & inp, int il) {
    inp = is_live() ? build_attn_inp(il) : nullptr;

    return inp;
}

bool llm_mod_graph::attend(llm_graph_input_attn_k * & inp, int il) {
    if (!is_live()) {
        return false;
    }
    const auto * all = build_attn_inp(il);

    inp = &inp_k.emplace_back(g.hparams, g.cparams, all->mctx);
    inp->self_k_idxs      = all->self_k_idxs;
    inp->self_kq_mask     = all->self_kq_mask;
    inp->self_kq_mask_cnv = all->self_kq_mask_cnv;

    return true;
}

llm_graph_input_attn_kv * llm_mod_graph::build_attn_inp(int il, int part) {
    const auto * mctx_mod = static_cast<const llama_kv_cache_mod_context *>(g.mctx);
    const auto * mctx     = mctx_mod->get_layer(il, part);

    const int32_t group = mctx_mod->get_group(il, part);
    if (const auto it = inp_attn.find(group); it != inp_attn.end()) {
        return it->second;
    }

    auto res = std::make_unique<llm_graph_input_attn_mod>(g.hparams, g.cparams, mctx_mod, il, part);

    res->self_k_idxs = mctx->build_input_k_idxs(g.ctx0, g.ubatch);
    res->self_v_idxs = g.hparams.is_mla() ? nullptr : mctx->build_input_v_idxs(g.ctx0, g.ubatch);

    if (seg->reserve && mask_any) {
        res->self_kq_mask = mask_any;
    } else {
        // flash attention requires an f16 mask
        const auto type = g.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;
        res->self_kq_mask = ggml_new_tensor_4d(g.ctx0, type, mctx->get_n_kv(), g.n_tokens, 1, 1);
        ggml_set_input(res->self_kq_mask);
        ggml_set_name(res->self_kq_mask, "attn_inp_kq_mask");
    }
    res->self_kq_mask_cnv = mask_any = res->self_kq_mask;

    res->k_rot = mctx->build_input_k_rot(g.ctx0);
    res->v_rot = mctx->build_input_v_rot(g.ctx0);
    res->self_k_rot = share_rot(k_rot, res->k_rot);
    res->self_v_rot = share_rot(v_rot, res->v_rot);
    res->n_kv       = mctx->get_n_kv();

    seg->attn.push_back(res.get());

    return inp_attn[group] = static_cast<llm_graph_input_attn_kv *>(g.res->add_input(std::move(res)));
}

bool llm_mod_graph::has_parts(int il) const {
    return seg->model->n_parts(il) > 1;
}

// max_bias of an attention of one head alone, which gives it the slope that it has as the head-th of n_head (ALiBi)
static float mod_max_bias(float max_bias, int64_t head, int64_t n_head) {
    int64_t n = 1; // as ggml counts slopes
    while (2*n <= n_head) {
        n *= 2;
    }
    return max_bias*(head < n ? head + 1 : head - n + 0.5f)/n;
}

// of the attention with this mask, among the nodes from `first` on
static void mod_set_max_bias(ggml_cgraph * gf, int first, const ggml_tensor * mask, float max_bias) {
    for (int i = first; i < ggml_graph_n_nodes(gf); ++i) {
        auto * node = ggml_graph_node(gf, i);
        const bool attends = (node->op == GGML_OP_SOFT_MAX && node->src[1] == mask) || (node->op == GGML_OP_FLASH_ATTN_EXT && node->src[3] == mask);
        if (attends) {
            memcpy((float *) node->op_params + 1, &max_bias, sizeof(max_bias));
        }
    }
}

ggml_tensor * llm_mod_graph::build_parts(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks,
        float kq_scale, int il) {
    const int64_t n_parts  = seg->model->n_parts(il);
    const int64_t n_head   = q->ne[1]/n_parts; // that share a K/V head
    const int64_t n_tokens = q->ne[2];

    // some architectures hand over V without an axis of heads
    if (v && ggml_is_contiguous(v) && v->ne[1] == n_tokens && v->ne[2] == 1 && v->ne[0] % n_parts == 0) {
        v = ggml_reshape_3d(g.ctx0, v, v->ne[0]/n_parts, n_parts, n_tokens);
    }
    if (!k || !v || kq_b || k->ne[1] != n_parts || v->ne[1] != n_parts || k->ne[2] != n_tokens || v->ne[2] != n_tokens) {
        throw std::runtime_error("K/V heads cannot be remembered apart: its attention is of another form");
    }

    const int64_t n_alike = g.hparams.use_alibi ? 1 : n_head; // heads that one node attends with

    std::vector<ggml_tensor *> res;
    for (int64_t i = 0; i < n_parts; ++i) {
        auto       * inp  = build_attn_inp(il, i);
        const auto * mctx = inp->mctx;

        ggml_tensor * k_part = ggml_view_3d(g.ctx0, k, k->ne[0], 1,      n_tokens, k->nb[1], k->nb[2], i*k->nb[1]);
        ggml_tensor * v_part = ggml_view_3d(g.ctx0, v, v->ne[0], 1,      n_tokens, v->nb[1], v->nb[2], i*v->nb[1]);

        ggml_build_forward_expand(gf, mctx->cpy_k(g.ctx0, k_part, inp->get_k_idxs(), il));
        ggml_build_forward_expand(gf, mctx->cpy_v(g.ctx0, v_part, inp->get_v_idxs(), il));

        for (int64_t head = i*n_head; head < (i + 1)*n_head; head += n_alike) {
            ggml_tensor * q_part     = ggml_view_3d(g.ctx0, q, q->ne[0], n_alike, n_tokens, q->nb[1], q->nb[2], head*q->nb[1]);
            ggml_tensor * sinks_part = sinks ? ggml_view_1d(g.ctx0, sinks, n_alike, head*sinks->nb[0]) : nullptr;

            const int first = ggml_graph_n_nodes(gf);

            res.push_back(g.build_attn_mha(q_part, mctx->get_k(g.ctx0, il), mctx->get_v(g.ctx0, il), nullptr, inp->get_kq_mask(),
                    sinks_part, nullptr, 0, kq_scale, il));

            if (g.hparams.use_alibi) {
                mod_set_max_bias(gf, first, inp->get_kq_mask(), mod_max_bias(g.hparams.f_max_alibi_bias, head, n_parts*n_head));
            }
        }
    }

    // pairs, pairs of pairs, ...: each value is copied log2(n_parts) times
    while (res.size() > 1) {
        std::vector<ggml_tensor *> joined;
        for (size_t i = 0; i < res.size(); i += 2) {
            joined.push_back(i + 1 < res.size() ? ggml_concat(g.ctx0, res[i], res[i + 1], 0) : res[i]);
        }
        res = std::move(joined);
    }
    return res[0];
}

ggml_tensor * llm_mod_graph::build_no_attn(const ggml_tensor * wo, const ggml_tensor * q, int il) const {
    const int64_t n_embd_head = g.hparams.is_mla() ? g.hparams.n_embd_head_v_mla() : g.hparams.n_embd_head_v(il);

    return ggml_new_tensor_2d(g.ctx0, GGML_TYPE_F32, wo ? wo->ne[1] : q->ne[1]*n_embd_head, g.n_tokens);
}

ggml_tensor * llm_mod_graph::build_gated(ggml_tensor * cur) const {
    if (!inp_gate) {
        return cur;
    }
    // y = h + g*(f(h) - h)
    cur = ggml_sub(g.ctx0, cur, inp_cur);
    cur = ggml_mul(g.ctx0, cur, inp_gate);
    cur = ggml_add(g.ctx0, inp_cur, cur);
    g.cb(cur, "mod_gated", -1);

    return cur;
}

// can the tensor's values be written to h right away? elementwise nodes may read there what they replace; embeddings lie
// in the CPU's memory, and a node that had to run where h is would take all of them there
static bool mod_can_alias(const ggml_tensor * t, const ggml_tensor * h) {
    const bool can = t->op == GGML_OP_ADD || (t->op == GGML_OP_GET_ROWS && ggml_backend_buffer_is_host(h->buffer));
    return can && !t->view_src && !t->data && t->type == GGML_TYPE_F32;
}

void llm_mod_graph::build_end(ggml_tensor * cur) {
    cur = build_gated(cur);

    ggml_tensor * out = cur;
    if (inp_rows) {
        out = ggml_set_rows(g.ctx0, seg->h, cur, inp_rows_out);
    } else if (mod_can_alias(cur, seg->h)) {
        ggml_backend_tensor_alloc(seg->h->buffer, cur, seg->h->data);
    } else {
        out = ggml_cpy(g.ctx0, cur, view_h());
    }
    g.cb(out, "mod_out", -1);

    // the scores first: they read cur, which the copy into h may not outlive
    if (seg->u1 > seg->u0) {
        build_scores(cur, std::max((seg->t1 - 1)/2, 0), seg->u0, seg->u1);
    }
    ggml_build_forward_expand(gf, out);
}

void llm_mod_graph::build_scores(ggml_tensor * cur, int32_t il, int32_t u0, int32_t u1) {
    const int64_t n = u1 - u0;

    auto * const all_w = seg->w[il];
    ggml_tensor * w = ggml_view_2d(g.ctx0, all_w, g.n_embd, n, all_w->nb[1], u0*all_w->nb[1]);
    ggml_tensor * b = ggml_view_1d(g.ctx0, seg->b[il], n, u0*ggml_element_size(seg->b[il]));

    ggml_tensor * s;
    if (seg->has_ops) {
        s = ggml_mod_score(g.ctx0, cur, w, b, seg->eps);
    } else {
        s = ggml_rms_norm(g.ctx0, cur, seg->eps);
        s = ggml_add(g.ctx0, ggml_mul_mat(g.ctx0, w, s), b);
    }
    g.cb(s, "mod_scores", -1);

    // one tensor for all scores of a device, where reading one may cost a round trip over a network
    ggml_tensor * before = !seg->has_ops && out_w == all_w ? seg->out.back().t : nullptr;
    seg->out.push_back({ u0, (int32_t) n, before ? (int32_t) before->ne[0] : 0, s });
    if (before) {
        before->flags &= ~GGML_TENSOR_FLAG_OUTPUT;
        s = ggml_concat(g.ctx0, before, s, 0);
        for (auto & o : seg->out) {
            o.t = o.t == before ? s : o.t;
        }
        seg->out.back().t = s;
    }
    out_w = all_w;

    ggml_set_output(s);
    ggml_build_forward_expand(gf, s);
}

ggml_tensor * llm_mod_graph::build_route(ggml_tensor * cur, int32_t u0, int32_t u1, int32_t unit) {
    const int64_t n = u1 - u0;

    if (!inp_limit) {
        auto inp = std::make_unique<llm_graph_input_mod_decider>(seg);

        inp->limit  = inp_limit  = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_F32, seg->model->units.size());
        inp->always = inp_always = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, 1);
        ggml_set_input(inp_limit);
        ggml_set_input(inp_always);
        ggml_set_name(inp_limit,  "mod_limit");
        ggml_set_name(inp_always, "mod_always");

        g.res->add_input(std::move(inp));
    }

    // all layers are on one device
    ggml_tensor * w = ggml_view_2d(g.ctx0, seg->w[0], g.n_embd, n, seg->w[0]->nb[1], u0*seg->w[0]->nb[1]);
    ggml_tensor * b = ggml_view_1d(g.ctx0, seg->b[0], n, u0*ggml_element_size(seg->b[0]));
    ggml_tensor * l = ggml_view_1d(g.ctx0, inp_limit, n, u0*ggml_element_size(inp_limit));

    ggml_tensor * res = ggml_mod_route(g.ctx0, cur, w, b, l, inp_always, seg->eps, seg->model->scale_output);
    g.cb(res, "mod_route", -1);

    // all decisions lie together, to be read at once
    ggml_backend_tensor_alloc(seg->routes->buffer, res, (char *) seg->routes->data + u0*seg->routes->nb[1]);
    ggml_build_forward_expand(gf, res);

    if (unit < 0) {
        return cur;
    }

    const auto & x = seg->model->units[unit];

    route      = res;
    route_unit = unit - u0;
    t_leave    = 2*x.layer + (x.kind == LLAMA_MOD_KIND_ATTN ? 0 : 1);

    return ggml_mod_gather(g.ctx0, cur, route, route_unit);
}

ggml_tensor * llm_mod_graph::build_router(ggml_tensor * cur, int32_t u0, int32_t u1) {
    int32_t unit = -1;
    for (int32_t u = u0; u < u1; ++u) {
        if (seg->model->units[u].kind != LLAMA_MOD_KIND_KV) {
            unit = u;
        }
    }

    // nodes that can be skipped pass on nothing but h: the graph's allocator does not know of skipping
    if (unit >= 0 && cur->view_src != seg->h) {
        ggml_build_forward_expand(gf, ggml_cpy(g.ctx0, cur, view_h()));
        cur = view_h();
    }

    if (seg->on_device) {
        return build_route(cur, u0, u1, unit);
    }

    seg->routers.push_back({ seg, u0, u1, unit, nullptr, {}, nullptr });
    auto * r = &seg->routers.back();

    ggml_tensor * gate = ggml_custom_4d(g.ctx0, GGML_TYPE_F32, 1, 1, 1, 1, &cur, 1, mod_route, 1, r);
    g.cb(gate, "mod_route", -1);
    ggml_build_forward_expand(gf, gate);

    r->self = gate;
    if (left && t_leave + 1 == seg->model->pos(u0)) {
        left->next = r;
    }
    left = nullptr;

    if (unit >= 0) {
        const auto & x = seg->model->units[unit];

        router  = r;
        t_leave = 2*x.layer + (x.kind == LLAMA_MOD_KIND_ATTN ? 0 : 1);
        i_node  = ggml_graph_n_nodes(gf);
        if (seg->model->scale_output) {
            inp_cur  = cur;
            inp_gate = gate;
        }
    }

    return cur;
}
