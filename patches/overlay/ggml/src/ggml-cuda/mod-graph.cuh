#include "common.cuh"

// Are there conditional nodes, and are CUDA graphs in use?
bool ggml_cuda_mod_skips();

// Called with each route and scatter. What a region would have to allocate inside a capture is there before the first.
void ggml_cuda_mod_prepare(ggml_backend_cuda_context & ctx);

// Called after each node while a CUDA graph is captured. What lies between a ggml_mod_route() and its ggml_mod_scatter()
// becomes a conditional node, which runs only if the route counts an active token.
void ggml_cuda_mod_capture(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
