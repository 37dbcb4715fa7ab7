#include "mod-graph.cuh"

#include "ggml-mod.h"

#include <cstdlib>

#if defined(USE_CUDA_GRAPH) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && CUDART_VERSION >= 12040

// CUDA 13 dropped the older forms of these functions and gave the newest their names
#if CUDART_VERSION >= 13000
#define MOD_CUDA_V(name, version) name
#else
#define MOD_CUDA_V(name, version) name##_v##version
#endif

// no other part of the backend captures on it
static constexpr int MOD_STREAM = GGML_CUDA_MAX_STREAMS - 1;

static __global__ void mod_set_condition_kernel(cudaGraphConditionalHandle handle, const int32_t * count) {
    cudaGraphSetConditional(handle, *count > 0);
}

static bool mod_is(const ggml_tensor * node, ggml_mod_op op) {
    const ggml_mod_params * params = ggml_mod_get_params(node);
    return params && params->op == op;
}

// the end of the region that node i begins, if all of it is in this graph
static const ggml_tensor * mod_find_end(const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * route = cgraph->nodes[i];
    for (int j = i + 1; j < cgraph->n_nodes; ++j) {
        const ggml_tensor * node = cgraph->nodes[j];
        if (mod_is(node, GGML_MOD_OP_SCATTER)) {
            return node->src[2] == route ? node : nullptr;
        }
        if (mod_is(node, GGML_MOD_OP_ROUTE)) {
            return nullptr;
        }
    }
    return nullptr;
}

// adds an IF node behind what has been captured, and returns its body
static cudaGraph_t mod_add_condition(cudaStream_t stream, const int32_t * count) {
    cudaStreamCaptureStatus   status;
    cudaGraph_t               graph;
    const cudaGraphNode_t   * deps;
    const cudaGraphEdgeData * edges;
    size_t                    n_deps;

    CUDA_CHECK(MOD_CUDA_V(cudaStreamGetCaptureInfo, 3)(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr));
    GGML_ASSERT(status == cudaStreamCaptureStatusActive);

    cudaGraphConditionalHandle handle;
    CUDA_CHECK(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault));

    mod_set_condition_kernel<<<1, 1, 0, stream>>>(handle, count);
    CUDA_CHECK(cudaGetLastError());

    CUDA_CHECK(MOD_CUDA_V(cudaStreamGetCaptureInfo, 3)(stream, &status, nullptr, &graph, &deps, &edges, &n_deps));

    cudaGraphNodeParams params = {};
    params.type               = cudaGraphNodeTypeConditional;
    params.conditional.handle = handle;
    params.conditional.type   = cudaGraphCondTypeIf;
    params.conditional.size   = 1;

    cudaGraphNode_t node;
    CUDA_CHECK(MOD_CUDA_V(cudaGraphAddNode, 2)(&node, graph, deps, edges, n_deps, &params));
    CUDA_CHECK(MOD_CUDA_V(cudaStreamUpdateCaptureDependencies, 2)(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies));

    return params.conditional.phGraph_out[0];
}

static bool mod_driver_has_conditions() {
    static const bool res = [] {
        int version = 0;
        CUDA_CHECK(cudaDriverGetVersion(&version));
        return version >= 12040;
    }();
    return res;
}

bool ggml_cuda_mod_skips() {
    // as upstream reads them
    const char * optimized = getenv("GGML_CUDA_GRAPH_OPT");
    const bool   disabled  = getenv("GGML_CUDA_DISABLE_GRAPHS") != nullptr || (optimized && atoi(optimized) == 1);

    return !disabled && mod_driver_has_conditions();
}

void ggml_cuda_mod_prepare(ggml_backend_cuda_context & ctx) {
    // regions use cuBLAS only where the rest does
    auto & handles = ctx.cublas_handles[ctx.device];
    if (ctx.curr_stream_no != 0 || !handles[0] || handles[MOD_STREAM]) {
        return;
    }
    cudaStreamCaptureStatus status;
    CUDA_CHECK(cudaStreamIsCapturing(ctx.stream(), &status));
    if (status == cudaStreamCaptureStatusNone) {
        ctx.curr_stream_no = MOD_STREAM;
        ctx.cublas_handle();
        ctx.curr_stream_no = 0;
    }
}

void ggml_cuda_mod_capture(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * node = cgraph->nodes[i];

    if (mod_is(node, GGML_MOD_OP_SCATTER) && ctx.curr_stream_no == MOD_STREAM) {
        cudaGraph_t body;
        CUDA_CHECK(cudaStreamEndCapture(ctx.stream(), &body));
        ctx.curr_stream_no = 0;
        return;
    }

    if (!mod_is(node, GGML_MOD_OP_ROUTE) || node->src[0]->ne[1] != 1 || !mod_driver_has_conditions()) {
        return;
    }

    // several streams would have to join inside the body
    const ggml_tensor * end = ctx.stream_context().concurrent_events.empty() ? mod_find_end(cgraph, i) : nullptr;
    if (!end) {
        return; // runs always, which is slower, not wrong
    }

    const int32_t * route = (const int32_t *) node->data + ggml_mod_get_params(end)->unit*node->ne[0];
    cudaGraph_t     body  = mod_add_condition(ctx.stream(), route);

    // kernels, pools and cuBLAS handles go by the number of the stream
    ctx.curr_stream_no = MOD_STREAM;
    CUDA_CHECK(cudaStreamBeginCaptureToGraph(ctx.stream(), body, nullptr, nullptr, 0, cudaStreamCaptureModeRelaxed));
}

#else

bool ggml_cuda_mod_skips() {
    return false;
}

void ggml_cuda_mod_prepare(ggml_backend_cuda_context & ctx) {
    GGML_UNUSED(ctx);
}

void ggml_cuda_mod_capture(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    GGML_UNUSED(ctx);
    GGML_UNUSED(cgraph);
    GGML_UNUSED(i);
}

#endif
