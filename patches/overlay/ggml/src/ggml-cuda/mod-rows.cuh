#include "common.cuh"

#define CUDA_MOD_ROWS_BLOCK_SIZE 256

void ggml_cuda_op_mod_gather (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_op_mod_scatter(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// of both
bool ggml_cuda_op_mod_rows_supported(int device, const ggml_tensor * dst);
