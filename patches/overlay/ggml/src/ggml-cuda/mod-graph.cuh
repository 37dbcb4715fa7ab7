#include "common.cuh"

// Called after each node while a CUDA graph is captured. What lies between a ggml_mod_route() and its ggml_mod_scatter()
// becomes a conditional node, which runs only if the route counts an active token.
void ggml_cuda_mod_capture(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
