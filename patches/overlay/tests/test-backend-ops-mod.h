#pragma once

// The ops of ggml-mod.h. Included by test-backend-ops.cpp, behind its own cases.

#include "ggml-mod.h"

struct test_mod : public test_case {
    std::mt19937 rng{42};

    // random columns as ggml_mod_route() makes them
    void init_route(ggml_tensor * t) {
        const int64_t n_tokens = (t->ne[0] - 1)/3;

        std::vector<int32_t> data;
        for (int64_t u = 0; u < t->ne[1]; ++u) {
            std::vector<int32_t> ids;
            std::vector<float>   gate(n_tokens, 0.0f);
            for (int64_t i = 0; i < n_tokens; ++i) {
                if (rng() % 2) {
                    gate[i] = ids.size() % 3 == 0 ? 1.0f : (rng() % 1000)/1000.0f;
                    ids.push_back(i);
                }
            }
            const int32_t count = ids.size();
            ids.resize(n_tokens, -1);

            data.push_back(count);
            data.insert(data.end(), ids.begin(), ids.end());
            data.resize(data.size() + 2*n_tokens);
            memcpy(&data[data.size() - n_tokens], gate.data(), n_tokens*sizeof(float));
        }
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (auto * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "route") == 0) {
                init_route(t);
            } else if (strcmp(t->name, "limit") == 0) {
                std::vector<float> data(t->ne[0]);
                for (size_t u = 0; u < data.size(); ++u) {
                    // all, none, some. with signs scores are close to whole numbers: rounding flips no decision
                    data[u] = u % 4 == 1 ? -INFINITY : u % 4 == 2 ? INFINITY : 0.5f;
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (t->type == GGML_TYPE_I32) {
                // sinks, positions, numbers of sequences
                const int32_t mod = strcmp(t->name, "pos") == 0 ? 300 : strcmp(t->name, "seq") == 0 ? 3 : 2;
                std::vector<int32_t> data(t->ne[0]);
                for (auto & x : data) {
                    x = rng() % mod;
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (strcmp(t->name, "cells") == 0) {
                std::vector<float> data;
                for (int64_t i = 0; i < ggml_nelements(t)/2; ++i) {
                    const int kind = rng() % 3; // empty, kept, dropped
                    data.push_back(kind == 0 ? INFINITY : (float) (rng() % 300));
                    data.push_back(kind == 2 ? data.back() + 31 : INFINITY);
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (strncmp(t->name, "sign_", 5) == 0) {
                std::vector<float> data(ggml_nelements(t));
                for (auto & x : data) {
                    x = rng() % 2 ? 1.0f : -1.0f;
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (!ggml_is_view_op(t->op)) {
                init_tensor_uniform(t);
            }
        }
    }

    ggml_tensor * input(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
        auto * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
        ggml_set_name(t, name);
        return t;
    }

    // rows that do not follow each other, like those of the residual stream
    ggml_tensor * input_rows(ggml_context * ctx, const char * name, int64_t n_embd, int64_t n_rows, bool v) {
        auto * t = input(ctx, name, GGML_TYPE_F32, n_embd + (v ? 32 : 0), n_rows);
        return v ? ggml_view_2d(ctx, t, n_embd, n_rows, t->nb[1], 0) : t;
    }
};

struct test_mod_score : public test_mod {
    const int64_t n_embd;
    const int64_t n_units;
    const int64_t n_tokens;
    const bool    v;

    test_mod_score(int64_t n_embd, int64_t n_units, int64_t n_tokens, bool v) : n_embd(n_embd), n_units(n_units), n_tokens(n_tokens), v(v) {}

    std::string op_desc(ggml_tensor *) override { return "MOD_SCORE"; }
    std::string vars() override { return VARS_TO_STR4(n_embd, n_units, n_tokens, v); }

    double max_nmse_err() override { return 1e-10; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        return ggml_mod_score(ctx, input_rows(ctx, "h", n_embd, n_tokens, v), input_rows(ctx, "w", n_embd, n_units, v),
            input(ctx, "b", GGML_TYPE_F32, n_units), 1e-5f);
    }
};

struct test_mod_route : public test_mod {
    const int64_t n_embd;
    const int64_t n_units;
    const int64_t n_tokens;
    const bool    scale;

    test_mod_route(int64_t n_embd, int64_t n_units, int64_t n_tokens, bool scale) : n_embd(n_embd), n_units(n_units), n_tokens(n_tokens), scale(scale) {}

    std::string op_desc(ggml_tensor *) override { return "MOD_ROUTE"; }
    std::string vars() override { return VARS_TO_STR4(n_embd, n_units, n_tokens, scale); }

    double max_nmse_err() override { return 1e-8; }

    // the counts and indices exactly, the bits of scores and gates as numbers
    double err(const float * a, const float * b, size_t n) override {
        const size_t n_col = 1 + 3*n_tokens;
        if (n != n_col*n_units) {
            return test_case::err(a, b, n); // a sentinel
        }
        const auto value = [&](const float * x, size_t i) {
            const int32_t bits = (int32_t) x[i]; // without some of the last bits
            float res;
            memcpy(&res, &bits, sizeof(res));
            return i % n_col <= (size_t) n_tokens ? x[i] : res;
        };
        std::vector<float> va, vb;
        for (size_t i = 0; i < n; ++i) {
            if (i % n_col <= (size_t) n_tokens && a[i] != b[i]) {
                return INFINITY;
            }
            if (i % n_col > (size_t) n_tokens) {
                va.push_back(value(a, i));
                vb.push_back(value(b, i));
            }
        }
        return test_case::err(va.data(), vb.data(), va.size());
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        return ggml_mod_route(ctx, input(ctx, "sign_h", GGML_TYPE_F32, n_embd, n_tokens), input(ctx, "sign_w", GGML_TYPE_F32, n_embd, n_units),
            input(ctx, "sign_b", GGML_TYPE_F32, n_units), input(ctx, "limit", GGML_TYPE_F32, n_units),
            input(ctx, "always", GGML_TYPE_I32, n_tokens), 1e-5f, scale);
    }
};

struct test_mod_gather : public test_mod {
    const int64_t n_embd;
    const int64_t n_tokens;
    const bool    v;

    test_mod_gather(int64_t n_embd, int64_t n_tokens, bool v) : n_embd(n_embd), n_tokens(n_tokens), v(v) {}

    std::string op_desc(ggml_tensor *) override { return "MOD_GATHER"; }
    std::string vars() override { return VARS_TO_STR3(n_embd, n_tokens, v); }

    double max_nmse_err() override { return 0.0; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        return ggml_mod_gather(ctx, input_rows(ctx, "h", n_embd, n_tokens + 1, v), input(ctx, "route", GGML_TYPE_I32, 1 + 3*n_tokens, 3), 2);
    }
};

struct test_mod_scatter : public test_mod {
    const int64_t n_embd;
    const int64_t n_tokens;
    const bool    v;

    test_mod_scatter(int64_t n_embd, int64_t n_tokens, bool v) : n_embd(n_embd), n_tokens(n_tokens), v(v) {}

    std::string op_desc(ggml_tensor *) override { return "MOD_SCATTER"; }
    std::string vars() override { return VARS_TO_STR3(n_embd, n_tokens, v); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        return ggml_mod_scatter(ctx, input(ctx, "h", GGML_TYPE_F32, n_embd, n_tokens + 1), input_rows(ctx, "x", n_embd, n_tokens, v),
            input(ctx, "route", GGML_TYPE_I32, 1 + 3*n_tokens, 3), 1);
    }
};

struct test_mod_mask : public test_mod {
    const ggml_type type;
    const int64_t   n_kv;
    const int64_t   n_tokens;
    const bool      seqs;

    test_mod_mask(ggml_type type, int64_t n_kv, int64_t n_tokens, bool seqs) : type(type), n_kv(n_kv), n_tokens(n_tokens), seqs(seqs) {}

    std::string op_desc(ggml_tensor *) override { return "MOD_MASK"; }
    std::string vars() override { return VARS_TO_STR4(type, n_kv, n_tokens, seqs); }

    // zeros and infinities
    double err(const float * a, const float * b, size_t n) override {
        return std::equal(a, a + n, b) ? 0.0 : INFINITY;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        return ggml_mod_mask(ctx, input(ctx, "cells", GGML_TYPE_F32, 2, n_kv + 5, seqs ? 3 : 1), input(ctx, "pos", GGML_TYPE_I32, n_tokens),
            seqs ? input(ctx, "seq", GGML_TYPE_I32, n_tokens) : nullptr, type, n_kv);
    }
};

static void add_test_cases_mod(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int64_t n_embd : { 32, 576, 4096 }) {
        for (int64_t n_tokens : { 1, 2, 33, 512, 1000 }) {
            for (bool flag : { false, true }) {
                for (int64_t n_units : { 1, 28 }) {
                    test_cases.emplace_back(new test_mod_score(n_embd, n_units, n_tokens, flag));
                    test_cases.emplace_back(new test_mod_route(n_embd, n_units, n_tokens, flag));
                }
                test_cases.emplace_back(new test_mod_gather (n_embd, n_tokens, flag));
                test_cases.emplace_back(new test_mod_scatter(n_embd, n_tokens, flag));
            }
        }
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32 }) {
        for (int64_t n_kv : { 1, 255, 256, 4096 }) {
            for (int64_t n_tokens : { 1, 8, 512 }) {
                for (bool seqs : { false, true }) {
                    test_cases.emplace_back(new test_mod_mask(type, n_kv, n_tokens, seqs));
                }
            }
        }
    }
}
