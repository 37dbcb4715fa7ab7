#include "common.cuh"

#include "ggml-mod.h"

// the ops of ggml-mod.h; false: dst is another custom op
bool ggml_cuda_op_mod(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool ggml_cuda_op_mod_supported(int device, const ggml_tensor * dst);
