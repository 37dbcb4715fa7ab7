#include "llama-mod-graph.h"

#include "llama-impl.h"
#include "llama-kv-cache-mod.h"
#include "llama-mod-model.h"

// which rows of h a unit's segment runs on, and their gates
class llm_graph_input_mod_rows : public llm_graph_input_i {
public:
    llm_graph_input_mod_rows(const llm_mod_segment * seg) : seg(seg) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (rows) {
            GGML_ASSERT(seg->rows.size() == ubatch->n_tokens);
            ggml_backend_tensor_set(rows, seg->rows.data(), 0, ggml_nbytes(rows));
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

    ggml_tensor * rows = nullptr; // I32 [n_tokens]
    ggml_tensor * gate = nullptr; // F32 [1, n_tokens]

    const llm_mod_segment * seg;
};

// the cache of one layer: as usual, but keys that a kv unit dropped are hidden from queries beyond the window
class llm_graph_input_attn_mod : public llm_graph_input_attn_kv {
public:
    llm_graph_input_attn_mod(const llama_hparams & hparams, const llama_cparams & cparams,
            const llama_kv_cache_mod_context * mctx_mod, int il) :
        llm_graph_input_attn_kv(hparams, cparams, mctx_mod->get_layer(il)), mctx_mod(mctx_mod), il(il) {}

    void set_input(const llama_ubatch * ubatch) override {
        llm_graph_input_attn_kv::set_input(ubatch);
        if (self_kq_mask && self_kq_mask->buffer) {
            mctx_mod->hide_dropped(self_kq_mask, ubatch, il);
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx_mod = static_cast<const llama_kv_cache_mod_context *>(params.mctx);
        mctx     = mctx_mod->get_layer(il);

        return self_k_idxs->ne[0]  == params.ubatch.n_tokens &&
               self_kq_mask->ne[0] == mctx->get_n_kv()       &&
               self_kq_mask->ne[1] == params.ubatch.n_tokens;
    }

    const llama_kv_cache_mod_context * mctx_mod;
    const int il;
};

//
// llm_mod_graph
//

llm_mod_graph::llm_mod_graph(const llm_graph_context & g) : g(g), seg(g.mod) {
    if (seg) {
        seg->out.clear();
    }
}

bool llm_mod_graph::has_attn() const {
    // halves [t0, t1) hold an even one
    return !seg || (seg->t0 + 1)/2*2 < seg->t1;
}

bool llm_mod_graph::has_attn(int il) const {
    return !seg || (seg->t0 <= 2*il && 2*il < seg->t1);
}

bool llm_mod_graph::has_ffn(int il) const {
    return !seg || (seg->t0 <= 2*il + 1 && 2*il + 1 < seg->t1);
}

bool llm_mod_graph::has_head() const {
    return !seg || seg->last;
}

ggml_tensor * llm_mod_graph::build_inp(ggml_tensor * tok_embd) {
    if (!seg || seg->first) {
        return g.build_inp_embd(tok_embd);
    }

    if (seg->unit >= 0) {
        auto inp = std::make_unique<llm_graph_input_mod_rows>(seg);

        if (seg->gather) {
            inp->rows = inp_rows = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_tokens);
            ggml_set_input(inp_rows);
            ggml_set_name(inp_rows, "mod_rows");
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
        inp_cur = ggml_view_2d(g.ctx0, seg->h, g.n_embd, g.n_tokens, seg->h->nb[1], 0);
    }
    g.cb(inp_cur, "mod_inp", -1);

    return inp_cur;
}

ggml_tensor * llm_mod_graph::build_out_rows(ggml_tensor * cur, ggml_tensor * inp_out_ids) const {
    if (!seg || !seg->last || !inp_out_ids || seg->t0 <= 2*(g.n_layer - 1)) {
        return cur;
    }
    return ggml_get_rows(g.ctx0, cur, inp_out_ids);
}

llm_graph_input_attn_kv * llm_mod_graph::build_attn_inp(llm_graph_input_attn_kv * inp, ggml_tensor * cur, int il) {
    if (!seg) {
        return inp;
    }

    if (seg->kv_inside && seg->unit < 0) {
        const int32_t u = seg->model->find(il, LLAMA_MOD_KIND_KV);
        if (u >= 0) {
            build_scores(cur, u, u + 1);
        }
    }

    const bool own = seg->model->has_cells(il);
    if (!own && inp_base) {
        return inp_base;
    }

    const auto * mctx_mod = static_cast<const llama_kv_cache_mod_context *>(g.mctx);
    const auto * mctx     = mctx_mod->get_layer(il);

    auto res = std::make_unique<llm_graph_input_attn_mod>(g.hparams, g.cparams, mctx_mod, il);

    res->self_k_idxs = mctx->build_input_k_idxs(g.ctx0, g.ubatch);
    res->self_v_idxs = mctx->build_input_v_idxs(g.ctx0, g.ubatch);

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

    res->self_k_rot = mctx->build_input_k_rot(g.ctx0);
    res->self_v_rot = mctx->build_input_v_rot(g.ctx0);

    auto * ptr = static_cast<llm_graph_input_attn_kv *>(g.res->add_input(std::move(res)));
    if (!own) {
        inp_base = ptr;
    }

    return ptr;
}

void llm_mod_graph::build_end(ggml_tensor * cur) {
    if (inp_gate) {
        // y = h + g*(f(h) - h)
        cur = ggml_sub(g.ctx0, cur, inp_cur);
        cur = ggml_mul(g.ctx0, cur, inp_gate);
        cur = ggml_add(g.ctx0, inp_cur, cur);
        g.cb(cur, "mod_gated", -1);
    }

    ggml_tensor * out;
    if (inp_rows) {
        out = ggml_set_rows(g.ctx0, seg->h, cur, inp_rows);
    } else {
        out = ggml_cpy(g.ctx0, cur, ggml_view_2d(g.ctx0, seg->h, g.n_embd, g.n_tokens, seg->h->nb[1], 0));
    }
    g.cb(out, "mod_out", -1);

    // the scores first: they read cur, which the copy into h may not outlive
    if (seg->u1 > seg->u0) {
        build_scores(cur, seg->u0, seg->u1);
    }
    ggml_build_forward_expand(g.gf, out);
}

void llm_mod_graph::build_scores(ggml_tensor * cur, int32_t u0, int32_t u1) {
    const int64_t n = u1 - u0;

    ggml_tensor * w = ggml_view_2d(g.ctx0, seg->w, g.n_embd, n, seg->w->nb[1], u0*seg->w->nb[1]);
    ggml_tensor * b = ggml_view_1d(g.ctx0, seg->b, n, u0*ggml_element_size(seg->b));

    ggml_tensor * s = ggml_rms_norm(g.ctx0, cur, g.norm_rms_eps);
    s = ggml_add(g.ctx0, ggml_mul_mat(g.ctx0, w, s), b);
    g.cb(s, "mod_scores", -1);

    ggml_set_output(s);
    ggml_build_forward_expand(g.gf, s);

    seg->out.push_back({ u0, (int32_t) n, s });
}
