#include "common.cuh"

#include "ggml-mod.h"

// memory that is committed on demand, see ggml-mod.h; without VMM its buffer_type() is NULL for every device
const ggml_mod_vmm * ggml_cuda_mod_vmm();

bool ggml_cuda_is_mod_vmm(ggml_backend_buffer_type_t buft);
