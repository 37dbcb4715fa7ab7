// How much faster is attention with quantised K and V a tile at a time?
//
//   FLAGS="-O2 -std=c++17 -I $SOURCE/ggml/include -L $LIB -Wl,-rpath,$LIB"
//   g++ $FLAGS scripts/studies/flash_tiles.cpp -lggml-cpu -lggml-base -o flash_tiles
//   ./flash_tiles [HEAD_DIM [N_HEAD]]
//
// SOURCE is the source of llama.cpp and LIB the folder of a built library, see `mod-export build`.
// N_HEAD query heads share one K/V head. Each line: the least processor time of one call, one thread,
// query by query and in tiles (ggml_mod_set_tiles), and how far apart the results are.

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-mod.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <utility>
#include <vector>

static double processor_seconds() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

static std::vector<float> noise(int64_t n) {
    std::vector<float> res(n);
    for (auto & x : res) {
        x = 2.0f*rand()/RAND_MAX - 1.0f;
    }
    return res;
}

static void fill(ggml_tensor * t) {
    const auto data = noise(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        std::copy(data.begin(), data.end(), (float *) t->data);
    } else {
        ggml_quantize_chunk(t->type, data.data(), t->data, 0, data.size()/t->ne[0], t->ne[0], nullptr);
    }
}

struct Shape {
    int64_t   head_dim, n_head, n_query, n_kv;
    ggml_type k, v;
};

// the least seconds of a call, and its result
static std::pair<double, std::vector<float>> measure(const Shape & s, bool tiles) {
    srand(1);
    ggml_context * ctx = ggml_init({ (size_t) 512 << 20, nullptr, false });

    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.head_dim, s.n_query, s.n_head);
    ggml_tensor * k = ggml_new_tensor_3d(ctx, s.k, s.head_dim, s.n_kv, 1);
    ggml_tensor * v = ggml_new_tensor_3d(ctx, s.v, s.head_dim, s.n_kv, 1);
    ggml_tensor * m = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, s.n_kv, s.n_query);
    for (auto * t : { q, k, v }) {
        fill(t);
    }
    for (int64_t i = 0; i < s.n_query; ++i) { // the queries are the last tokens
        for (int64_t j = 0; j < s.n_kv; ++j) {
            const bool sees = j <= s.n_kv - s.n_query + i;
            ((ggml_fp16_t *) m->data)[i*s.n_kv + j] = ggml_fp32_to_fp16(sees ? 0.0f : -INFINITY);
        }
    }

    ggml_tensor * res = ggml_flash_attn_ext(ctx, q, k, v, m, 1.0f/sqrtf(s.head_dim), 0.0f, 0.0f);
    if (tiles) {
        ggml_mod_set_tiles(res);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, res);

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);

    double best = INFINITY;
    const double until = processor_seconds() + 0.1;
    do {
        const double start = processor_seconds();
        ggml_backend_graph_compute(backend, graph);
        best = std::min(best, processor_seconds() - start);
    } while (processor_seconds() < until);

    std::vector<float> values((float *) res->data, (float *) res->data + ggml_nelements(res));
    ggml_backend_free(backend);
    ggml_free(ctx);
    return { best, values };
}

int main(int argc, char ** argv) {
    const int64_t head_dim = argc > 1 ? atoi(argv[1]) : 64;
    const int64_t n_head   = argc > 2 ? atoi(argv[2]) : 3;

    const std::pair<ggml_type, ggml_type> types[] = {
        { GGML_TYPE_F16,  GGML_TYPE_F16  },
        { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 },
        { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 },
        { GGML_TYPE_Q4_0, GGML_TYPE_Q4_0 },
    };
    for (int64_t n_kv : { 512, 4096 }) {
        for (const auto & [k, v] : types) {
            for (int64_t n_query : { 8, 16, 32, 64, 512 }) {
                const Shape shape = { head_dim, n_head, n_query, n_kv, k, v };
                const auto [t0, y0] = measure(shape, false);
                const auto [t1, y1] = measure(shape, true);

                double diff = 0.0, sum = 0.0;
                for (size_t i = 0; i < y0.size(); ++i) {
                    diff += pow(y0[i] - y1[i], 2);
                    sum  += pow(y0[i], 2);
                }
                printf("%5d cells, %s/%s, %3d queries: %9.0f us, tiles %9.0f us, ratio %.2f, nmse %.0e\n",
                    (int) n_kv, ggml_type_name(k), ggml_type_name(v), (int) n_query, 1e6*t0, 1e6*t1, t1/t0, diff/sum);
            }
        }
    }
    return 0;
}
