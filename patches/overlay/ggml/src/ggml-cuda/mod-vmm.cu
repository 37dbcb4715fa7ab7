#include "mod-vmm.cuh"

#include "ggml-backend-impl.h"

#if defined(GGML_USE_VMM) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

// Buffers say that they are of the device's ordinary type, since all that is done with them on the device is the same.
// Only their memory is our own.

static constexpr size_t MOD_VMM_SPARE = 256*1024*1024; // bytes of the device that are not committed

struct mod_vmm_buffer {
    int         device;
    CUdeviceptr base;
    size_t      page;

    std::vector<bool> mapped; // by page

    size_t size() const { return mapped.size()*page; }

    // f(first, number) for each run of pages in [p0, p1) that are mapped, or are not
    template <typename F> bool for_runs(size_t p0, size_t p1, bool value, F f) {
        for (size_t p = p0, n; p < p1; p += n) {
            for (n = 1; p + n < p1 && mapped[p + n] == mapped[p]; ++n) {}
            if (mapped[p] == value && !f(p, n)) {
                return false;
            }
        }
        return true;
    }

    bool map(size_t p, size_t n) {
        CUmemAllocationProp prop = {};
        prop.type          = CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        prop.location.id   = ggml_cuda_info().devices[device].physical_device;

        CUmemAccessDesc access = {};
        access.location = prop.location;
        access.flags    = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;

        for (size_t i = p; i < p + n; ++i) {
            // one allocation for each page, so that each can be given back
            CUmemGenericAllocationHandle handle;
            if (cuMemCreate(&handle, page, &prop, 0) != CUDA_SUCCESS) {
                return false;
            }
            mapped[i] = cuMemMap(base + i*page, page, 0, handle, 0) == CUDA_SUCCESS;
            CU_CHECK(cuMemRelease(handle)); // the mapping keeps it
            if (!mapped[i]) {
                return false;
            }
        }
        if (cuMemSetAccess(base + p*page, n*page, &access, 1) != CUDA_SUCCESS) {
            return false;
        }
        CUDA_CHECK(cudaMemsetAsync((void *) (base + p*page), 0, n*page, cudaStreamPerThread));
        return true;
    }

    bool unmap(size_t p, size_t n) {
        for (size_t i = p; i < p + n; ++i) {
            CU_CHECK(cuMemUnmap(base + i*page, page));
            mapped[i] = false;
        }
        return true;
    }
};

static mod_vmm_buffer & mod_get(ggml_backend_buffer_t buf) {
    return *(mod_vmm_buffer *) buf->context;
}

//
// buffer
//

static void mod_vmm_free_buffer(ggml_backend_buffer_t buf) {
    auto & b = mod_get(buf);

    ggml_cuda_set_device(b.device);
    CUDA_CHECK(cudaDeviceSynchronize());
    b.for_runs(0, b.mapped.size(), true, [&](size_t p, size_t n) { return b.unmap(p, n); });
    CU_CHECK(cuMemAddressFree(b.base, b.size()));

    delete &b;
}

static void * mod_vmm_get_base(ggml_backend_buffer_t buf) {
    return (void *) mod_get(buf).base;
}

static void mod_vmm_memset_tensor(ggml_backend_buffer_t buf, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    ggml_cuda_set_device(mod_get(buf).device);
    CUDA_CHECK(cudaMemsetAsync((char *) tensor->data + offset, value, size, cudaStreamPerThread));
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

static void mod_vmm_set_tensor(ggml_backend_buffer_t buf, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    ggml_cuda_set_device(mod_get(buf).device);
    CUDA_CHECK(cudaMemcpyAsync((char *) tensor->data + offset, data, size, cudaMemcpyHostToDevice, cudaStreamPerThread));
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

static void mod_vmm_get_tensor(ggml_backend_buffer_t buf, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    ggml_cuda_set_device(mod_get(buf).device);
    CUDA_CHECK(cudaMemcpyAsync(data, (const char *) tensor->data + offset, size, cudaMemcpyDeviceToHost, cudaStreamPerThread));
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

static void mod_vmm_set_tensor_2d(ggml_backend_buffer_t buf, ggml_tensor * tensor, const void * data,
        size_t offset, size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data) {
    ggml_cuda_set_device(mod_get(buf).device);
    CUDA_CHECK(cudaMemcpy2DAsync((char *) tensor->data + offset, stride_tensor, data, stride_data, size, n_copies,
            cudaMemcpyHostToDevice, cudaStreamPerThread));
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

static void mod_vmm_get_tensor_2d(ggml_backend_buffer_t buf, const ggml_tensor * tensor, void * data,
        size_t offset, size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data) {
    ggml_cuda_set_device(mod_get(buf).device);
    CUDA_CHECK(cudaMemcpy2DAsync(data, stride_data, (const char *) tensor->data + offset, stride_tensor, size, n_copies,
            cudaMemcpyDeviceToHost, cudaStreamPerThread));
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

static void mod_vmm_clear(ggml_backend_buffer_t buf, uint8_t value) {
    auto & b = mod_get(buf);
    GGML_ASSERT(value == 0); // what pages begin with

    ggml_cuda_set_device(b.device);
    b.for_runs(0, b.mapped.size(), true, [&](size_t p, size_t n) {
        CUDA_CHECK(cudaMemsetAsync((void *) (b.base + p*b.page), 0, n*b.page, cudaStreamPerThread));
        return true;
    });
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

static const ggml_backend_buffer_i mod_vmm_buffer_interface = {
    /* .free_buffer   = */ mod_vmm_free_buffer,
    /* .get_base      = */ mod_vmm_get_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ mod_vmm_memset_tensor,
    /* .set_tensor    = */ mod_vmm_set_tensor,
    /* .get_tensor    = */ mod_vmm_get_tensor,
    /* .set_tensor_2d = */ mod_vmm_set_tensor_2d,
    /* .get_tensor_2d = */ mod_vmm_get_tensor_2d,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ mod_vmm_clear,
    /* .reset         = */ nullptr,
};

//
// buffer type
//

static int mod_vmm_device(ggml_backend_buffer_type_t buft) {
    return (int) (intptr_t) buft->context;
}

static const char * mod_vmm_get_name(ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_name(ggml_backend_cuda_buffer_type(mod_vmm_device(buft)));
}

static ggml_backend_buffer_t mod_vmm_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const int    device = mod_vmm_device(buft);
    const size_t page   = ggml_cuda_info().devices[device].vmm_granularity;

    ggml_cuda_set_device(device);

    CUdeviceptr base;
    if (cuMemAddressReserve(&base, GGML_PAD(size, page), 0, 0, 0) != CUDA_SUCCESS) {
        GGML_LOG_ERROR("%s: no %.2f MiB of addresses on device %d\n", __func__, size/1024.0/1024.0, device);
        return nullptr;
    }

    auto * b = new mod_vmm_buffer { device, base, page, std::vector<bool>(GGML_PAD(size, page)/page) };

    return ggml_backend_buffer_init(ggml_backend_cuda_buffer_type(device), mod_vmm_buffer_interface, b, size);
}

static size_t mod_vmm_get_alignment(ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_get_alignment(ggml_backend_cuda_buffer_type(mod_vmm_device(buft)));
}

static size_t mod_vmm_get_alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * tensor) {
    return ggml_backend_buft_get_alloc_size(ggml_backend_cuda_buffer_type(mod_vmm_device(buft)), tensor);
}

static ggml_backend_buffer_type_t mod_vmm_buffer_type(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type bufts[GGML_CUDA_MAX_DEVICES];
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);

    // pages of the device alone would not be lent from the host
    if (getenv("GGML_CUDA_ENABLE_UNIFIED_MEMORY") != nullptr) {
        return nullptr;
    }
    for (int i = 0; i < ggml_backend_cuda_get_device_count(); ++i) {
        if (ggml_backend_cuda_buffer_type(i)->device != dev || !ggml_cuda_info().devices[i].vmm) {
            continue;
        }
        bufts[i] = {
            /* .iface   = */ {
                /* .get_name       = */ mod_vmm_get_name,
                /* .alloc_buffer   = */ mod_vmm_alloc_buffer,
                /* .get_alignment  = */ mod_vmm_get_alignment,
                /* .get_max_size   = */ nullptr,
                /* .get_alloc_size = */ mod_vmm_get_alloc_size,
                /* .is_host        = */ nullptr,
            },
            /* .device  = */ dev,
            /* .context = */ (void *) (intptr_t) i,
        };
        return &bufts[i];
    }
    return nullptr;
}

bool ggml_cuda_is_mod_vmm(ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == mod_vmm_get_name;
}

//
// ggml_mod_vmm
//

static bool mod_vmm_is_vmm(ggml_backend_buffer_t buf) {
    return buf->iface.free_buffer == mod_vmm_free_buffer;
}

static bool mod_vmm_commit(ggml_backend_buffer_t buf, void * data, size_t size) {
    auto & b = mod_get(buf);

    const size_t at = (CUdeviceptr) data - b.base;
    const size_t p0 = at/b.page;
    const size_t p1 = (at + size + b.page - 1)/b.page;
    GGML_ASSERT(p1 <= b.mapped.size());
    if (size == 0) {
        return true;
    }

    ggml_cuda_set_device(b.device);

    // what is allocated later and cannot do without (compute buffers, graphs, cuBLAS) would end the process
    size_t missing = 0;
    b.for_runs(p0, p1, false, [&](size_t, size_t n) { missing += n*b.page; return true; });
    if (missing > 0) {
        size_t free, total;
        CUDA_CHECK(cudaMemGetInfo(&free, &total));
        if (free < missing + MOD_VMM_SPARE) {
            return false;
        }
    }

    const std::vector<bool> before = b.mapped;

    const bool ok = b.for_runs(p0, p1, false, [&](size_t p, size_t n) { return b.map(p, n); });
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
    if (!ok) {
        for (size_t p = p0; p < p1; ++p) {
            if (b.mapped[p] && !before[p]) {
                b.unmap(p, 1);
            }
        }
    }
    return ok;
}

static void mod_vmm_release(ggml_backend_buffer_t buf, void * data, size_t size) {
    auto & b = mod_get(buf);

    const size_t at = (CUdeviceptr) data - b.base;
    const size_t p0 = (at + b.page - 1)/b.page;
    const size_t p1 = (at + size)/b.page;

    bool idle = false;
    b.for_runs(p0, p1, true, [&](size_t p, size_t n) {
        if (!idle) {
            ggml_cuda_set_device(b.device);
            CUDA_CHECK(cudaDeviceSynchronize());
            idle = true;
        }
        return b.unmap(p, n);
    });
}

static size_t mod_vmm_backed(ggml_backend_buffer_t buf, const void * data, size_t size) {
    auto & b = mod_get(buf);

    const size_t at = (CUdeviceptr) data - b.base;
    size_t res = 0;
    b.for_runs((at + b.page - 1)/b.page, (at + size + b.page - 1)/b.page, true, [&](size_t, size_t n) {
        res += n*b.page;
        return true;
    });
    return res;
}

#else

static ggml_backend_buffer_type_t mod_vmm_buffer_type(ggml_backend_dev_t) {
    return nullptr;
}

bool ggml_cuda_is_mod_vmm(ggml_backend_buffer_type_t) {
    return false;
}

static bool   mod_vmm_is_vmm (ggml_backend_buffer_t)                       { return false; }
static bool   mod_vmm_commit (ggml_backend_buffer_t, void *, size_t)       { return true; }
static void   mod_vmm_release(ggml_backend_buffer_t, void *, size_t)       {}
static size_t mod_vmm_backed (ggml_backend_buffer_t, const void *, size_t) { return 0; }

#endif // defined(GGML_USE_VMM) && !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

const ggml_mod_vmm * ggml_cuda_mod_vmm() {
    static const ggml_mod_vmm vmm = {
        /* .buffer_type = */ mod_vmm_buffer_type,
        /* .is_vmm      = */ mod_vmm_is_vmm,
        /* .commit      = */ mod_vmm_commit,
        /* .release     = */ mod_vmm_release,
        /* .backed      = */ mod_vmm_backed,
    };
    return &vmm;
}
