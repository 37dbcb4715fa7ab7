// How long does attention take on the CPU when each K/V head has cells of its own?
//
//   FLAGS="-O2 -std=c++17 -I $SOURCE/ggml/include -L $LIB -Wl,-rpath,$LIB"
//   g++ $FLAGS scripts/studies/flash_heads.cpp -lggml-cpu -lggml-base -o flash_heads
//   ./flash_heads THREADS smollm2|llama8b decode|prefill|store
//
// SOURCE is the source of llama.cpp and LIB the folder of a built library, see `mod-export build`.
// Each line is one layer: the median time in microseconds, and its ratio to one call for all heads
// that attends to as many cells in sum.

#include "ggml.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct Shape {
    const char * name;
    int64_t n_head, n_head_kv, head_dim;
};

static const Shape SHAPES[] = { { "smollm2", 9, 3, 64 }, { "llama8b", 32, 8, 128 } };

// the shares of the tokens that the heads keep, as measured on SmolLM2-135M
static const double SHARES[] = { 0.14, 0.67, 0.81, 0.64, 0.16, 0.04, 0.45, 0.33 };

// ways to attend
enum Form {
    ONE,         // one call for all heads, which share their cells
    HEAD_CONCAT, // one call for each K/V head, outputs joined by ggml_concat
    HEAD_PLACE,  // one call for each K/V head, each writes into its part of one tensor; many queries: then one copy
    STREAMS,     // one call, K/V heads as streams, as long as the longest
    MASKS,       // one call, a mask for each query head, as long as the longest
};

static const char * FORMS[] = { "one call", "per head, concat", "per head, in place", "heads as streams", "a mask per head" };

struct Bench {
    Shape     shape;
    ggml_type type;
    int       n_threads;
    int64_t   n_query;

    ggml_context * ctx   = nullptr;
    ggml_cgraph *  graph = nullptr;

    explicit Bench(Shape shape, ggml_type type, int n_threads, int64_t n_query, size_t size) :
        shape(shape), type(type), n_threads(n_threads), n_query(n_query) {
        ctx = ggml_init({ size, nullptr, false });
        graph = ggml_new_graph_custom(ctx, 8192, false);
    }

    ~Bench() { ggml_free(ctx); }

    ggml_tensor * random(ggml_type t, int64_t a, int64_t b, int64_t c, int64_t d) {
        ggml_tensor * res = ggml_new_tensor_4d(ctx, t, a, b, c, d);
        std::vector<float> row(a);
        const int64_t n = ggml_nrows(res);
        for (int64_t i = 0; i < n; ++i) {
            // a few different rows are enough: time does not depend on the numbers
            if (i < 64) {
                for (auto & x : row) {
                    x = (rand() % 2001 - 1000)/1000.0f;
                }
                ggml_quantize_chunk(t, row.data(), (char *) res->data + i*res->nb[1], 0, 1, a, nullptr);
            } else {
                memcpy((char *) res->data + i*res->nb[1], (char *) res->data + (i % 64)*res->nb[1], res->nb[1]);
            }
        }
        return res;
    }

    // causal: the queries are the last ones of the cells; those beyond n are empty. planes: [n_kv, n_query, planes]
    ggml_tensor * mask(int64_t n_kv, const std::vector<int64_t> & n, int dim) {
        const int64_t n_planes = n.size();
        ggml_tensor * res = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, n_query, dim == 2 ? n_planes : 1, dim == 3 ? n_planes : 1);
        const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY), seen = ggml_fp32_to_fp16(0.0f);
        auto * data = (ggml_fp16_t *) res->data;
        for (int64_t h = 0; h < n_planes; ++h) {
            for (int64_t i = 0; i < n_query; ++i) {
                for (int64_t j = 0; j < n_kv; ++j) {
                    *data++ = j <= n[h] - n_query + i ? seen : hidden;
                }
            }
        }
        return res;
    }

    ggml_tensor * flash(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * m, void * place = nullptr) {
        ggml_tensor * res = ggml_flash_attn_ext(ctx, q, k, v, m, 1.0f/sqrtf(shape.head_dim), 0.0f, 0.0f);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        if (place) {
            res->data = place;
        }
        return res;
    }

    // n: cells of each K/V head
    void attention(Form form, const std::vector<int64_t> & n) {
        const int64_t D = shape.head_dim, H = shape.n_head, G = shape.n_head_kv, R = H/G;
        const int64_t n_max = *std::max_element(n.begin(), n.end());

        // [D, H, n_query] as a model makes it
        ggml_tensor * q_all = random(GGML_TYPE_F32, D, H, n_query, 1);
        ggml_tensor * q     = ggml_permute(ctx, q_all, 0, 2, 1, 3);

        if (form == ONE || form == MASKS) {
            ggml_tensor * k = ggml_permute(ctx, random(type, D, G, n_max, 1), 0, 2, 1, 3);
            ggml_tensor * v = ggml_permute(ctx, random(type, D, G, n_max, 1), 0, 2, 1, 3);
            std::vector<int64_t> planes;
            for (int64_t h = 0; form == MASKS && h < H; ++h) {
                planes.push_back(n[h/R]);
            }
            ggml_build_forward_expand(graph, flash(q, k, v, form == ONE ? mask(n_max, { n_max }, 2) : mask(n_max, planes, 2)));
            return;
        }

        if (form == STREAMS) {
            ggml_tensor * k = random(type, D, n_max, 1, G);
            ggml_tensor * v = random(type, D, n_max, 1, G);
            // [D, n_query, R, G]
            ggml_tensor * qs = ggml_view_4d(ctx, q_all, D, n_query, R, G, q_all->nb[2], q_all->nb[1], R*q_all->nb[1], 0);
            ggml_tensor * res = flash(qs, k, v, mask(n_max, n, 3));
            if (n_query > 1) {
                res = ggml_cont(ctx, ggml_permute(ctx, res, 0, 1, 3, 2));
            }
            ggml_build_forward_expand(graph, res);
            return;
        }

        ggml_tensor * out = form == HEAD_PLACE ? ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, R, n_query, G) : nullptr;
        ggml_tensor * joined = nullptr;
        for (int64_t h = 0; h < G; ++h) {
            ggml_tensor * k = random(type, D, n[h], 1, 1);
            ggml_tensor * v = random(type, D, n[h], 1, 1);
            ggml_tensor * qh = ggml_view_3d(ctx, q, D, n_query, R, q->nb[1], q->nb[2], h*R*q->nb[2]);
            ggml_tensor * res = flash(qh, k, v, mask(n[h], { n[h] }, 2), out ? (char *) out->data + h*out->nb[3] : nullptr);
            ggml_build_forward_expand(graph, res);
            joined = out ? out : joined ? ggml_concat(ctx, joined, res, 1) : res;
        }
        if (!out) {
            ggml_build_forward_expand(graph, joined);
        } else if (n_query > 1) {
            ggml_build_forward_expand(graph, ggml_cont(ctx, ggml_permute(ctx, out, 0, 1, 3, 2)));
        }
    }

    // storing K and V of n_query tokens: one node for each of K and V, one for each head and each of K and V, or one
    // node of our own for all
    void store(int nodes, int64_t n_kv) {
        const int64_t D = shape.head_dim, G = shape.n_head_kv;
        ggml_tensor * idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_query);
        for (int64_t i = 0; i < n_query; ++i) {
            ((int64_t *) idx->data)[i] = n_kv - n_query + i;
        }
        ggml_tensor * cur[2] = { random(GGML_TYPE_F32, D, G, n_query, 1), random(GGML_TYPE_F32, D, G, n_query, 1) };
        std::vector<ggml_tensor *> args = { idx };
        for (auto * c : cur) {
            if (nodes == 0) {
                ggml_tensor * dst = ggml_new_tensor_2d(ctx, type, D*G, n_kv);
                ggml_build_forward_expand(graph, ggml_set_rows(ctx, dst, ggml_reshape_2d(ctx, c, D*G, n_query), idx));
                continue;
            }
            args.push_back(c);
            for (int64_t h = 0; h < G; ++h) {
                ggml_tensor * dst = ggml_new_tensor_2d(ctx, type, D, n_kv);
                ggml_tensor * src = ggml_view_2d(ctx, c, D, n_query, c->nb[2], h*c->nb[1]);
                if (nodes == 1) {
                    ggml_build_forward_expand(graph, ggml_set_rows(ctx, dst, src, idx));
                }
                args.push_back(dst);
            }
        }
        if (nodes == 2) {
            // an operation has ten sources at most: the tensors of more heads go by the pointer
            auto * all = new std::vector<ggml_tensor *>(args);
            ggml_build_forward_expand(graph, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args.data(), 3, store_all, GGML_N_TASKS_MAX, all));
        }
    }

    static void store_all(ggml_tensor *, int ith, int nth, void * userdata) {
        const auto & args = *(const std::vector<ggml_tensor *> *) userdata;
        const ggml_tensor * idx = args[0];
        const size_t n_head = (args.size() - 3)/2;
        for (size_t part = 0; part < 2; ++part) {
            const ggml_tensor * src = args[1 + part*(n_head + 1)];
            for (size_t h = 0; h < n_head; ++h) {
                ggml_tensor * dst = args[2 + part*(n_head + 1) + h];
                const auto from_float = ggml_get_type_traits_cpu(dst->type)->from_float;
                for (int64_t i = ith; i < src->ne[2]; i += nth) {
                    from_float((const float *) ((const char *) src->data + i*src->nb[2] + h*src->nb[1]),
                            (char *) dst->data + ((int64_t *) idx->data)[i]*dst->nb[1], src->ne[0]);
                }
            }
        }
    }

    // median seconds of one run of the graph
    double time(double at_least) {
        ggml_cplan plan = ggml_graph_plan(graph, n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        std::vector<double> times;
        double sum = 0;
        ggml_graph_compute(graph, &plan);
        while (sum < at_least || times.size() < 3) {
            const auto start = std::chrono::steady_clock::now();
            ggml_graph_compute(graph, &plan);
            times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
            sum += times.back();
        }
        std::nth_element(times.begin(), times.begin() + times.size()/2, times.end());
        return times[times.size()/2];
    }
};

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s THREADS smollm2|llama8b decode|prefill|store\n", argv[0]);
        return 2;
    }
    const int         n_threads = atoi(argv[1]);
    const Shape       shape     = SHAPES[std::string(argv[2]) == "llama8b"];
    const std::string what      = argv[3];
    const int64_t     n_query   = what == "prefill" ? 512 : 1;

    printf("%s, %s, %d threads\n", shape.name, what.c_str(), n_threads);
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int64_t n_kv : { 2048, 8192 }) {
            if (what == "store") {
                for (const int64_t n_tokens : { 1, 512 }) {
                    double first = 0;
                    for (int nodes = 0; nodes < 3; ++nodes) {
                        const int64_t n_layer = 16;
                        Bench bench(shape, type, n_threads, n_tokens, (size_t) 3 << 30);
                        for (int64_t i = 0; i < n_layer; ++i) {
                            bench.store(nodes, n_kv);
                        }
                        const double t = bench.time(0.2)/n_layer;
                        first = nodes == 0 ? t : first;
                        static const char * names[] = { "K and V", "K and V of each head", "one node of our own" };
                        printf("%-5s %5lld cells %4lld tokens  %-22s %9.1f us  %5.2f\n", ggml_type_name(type), (long long) n_kv,
                                (long long) n_tokens, names[nodes], 1e6*t, t/first);
                    }
                }
                continue;
            }
            // more than the caches hold, as in a model
            const int64_t n_layer = what == "prefill" ? 1 : shape.head_dim == 64 ? 16 : 4;
            for (const bool equal : { true, false }) {
                std::vector<int64_t> n(shape.n_head_kv, n_kv);
                int64_t sum = 0;
                for (size_t h = 0; h < n.size(); ++h) {
                    n[h] = equal ? n_kv : std::max<int64_t>(SHARES[h]*n_kv, n_query);
                    sum += n[h];
                }
                double first = 0;
                for (int form = ONE; form <= MASKS; ++form) {
                    Bench bench(shape, type, n_threads, n_query, (size_t) 3 << 30);
                    for (int64_t i = 0; i < n_layer; ++i) {
                        // for the comparison the heads share as many cells as they have in the mean
                        bench.attention((Form) form, form == ONE ? std::vector<int64_t>(n.size(), sum/n.size()) : n);
                    }
                    const double t = bench.time(what == "prefill" ? 0.2 : 0.3)/n_layer;
                    first = form == ONE ? t : first;
                    printf("%-5s %5lld tokens  %-7s %-20s %9.1f us  %5.2f\n", ggml_type_name(type), (long long) n_kv,
                            equal ? "all" : "shares", FORMS[form], 1e6*t, t/first);
                    fflush(stdout);
                }
            }
        }
    }
    return 0;
}
