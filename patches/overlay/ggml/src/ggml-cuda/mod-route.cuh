#include "common.cuh"

#define CUDA_MOD_ROUTE_BLOCK_SIZE 256

// grid dimension y
#define CUDA_MOD_ROUTE_MAX_UNITS 65535

void ggml_cuda_op_mod_score(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_mod_route(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// of both
bool ggml_cuda_op_mod_route_supported(int device, const ggml_tensor * dst);
