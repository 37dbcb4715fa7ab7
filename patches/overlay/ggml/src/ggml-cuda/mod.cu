#include "mod.cuh"
#include "mod-graph.cuh"
#include "mod-mask.cuh"
#include "mod-route.cuh"
#include "mod-rows.cuh"

bool ggml_cuda_op_mod(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_mod_params * params = ggml_mod_get_params(dst);
    if (!params) {
        return false;
    }

    switch (params->op) {
        case GGML_MOD_OP_SCORE:
            ggml_cuda_op_mod_score(ctx, dst);
            return true;
        case GGML_MOD_OP_ROUTE:
            ggml_cuda_mod_prepare(ctx);
            ggml_cuda_op_mod_route(ctx, dst);
            return true;
        case GGML_MOD_OP_GATHER:
            ggml_cuda_op_mod_gather(ctx, dst);
            return true;
        case GGML_MOD_OP_SCATTER:
            ggml_cuda_mod_prepare(ctx);
            ggml_cuda_op_mod_scatter(ctx, dst);
            return true;
        case GGML_MOD_OP_MASK:
            ggml_cuda_op_mod_mask(ctx, dst);
            return true;
        default:
            return false;
    }
}

bool ggml_cuda_op_mod_supported(int device, const ggml_tensor * dst) {
    const ggml_mod_params * params = ggml_mod_get_params(dst);
    if (!params) {
        return false;
    }

    switch (params->op) {
        case GGML_MOD_OP_SCORE:
        case GGML_MOD_OP_ROUTE:
            return ggml_cuda_op_mod_route_supported(device, dst);
        case GGML_MOD_OP_GATHER:
        case GGML_MOD_OP_SCATTER:
            return ggml_cuda_op_mod_rows_supported(device, dst);
        case GGML_MOD_OP_MASK:
            return ggml_cuda_op_mod_mask_supported(device, dst);
        default:
            return false;
    }
}
