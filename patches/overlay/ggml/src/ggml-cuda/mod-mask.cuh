#include "common.cuh"

#define CUDA_MOD_MASK_BLOCK_SIZE 256
#define CUDA_MOD_MASK_MAX_TOKENS 65535 // grid dimension y

void ggml_cuda_op_mod_mask(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool ggml_cuda_op_mod_mask_supported(int device, const ggml_tensor * dst);
