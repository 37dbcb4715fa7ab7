#include "llama-mod-buffer.h"

// the buffer interface is internal to ggml; the source is pinned
#include "../ggml/src/ggml-backend-impl.h"

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#define LLAMA_MOD_LAZY
#include <sys/mman.h>
#include <unistd.h>
#endif

#ifdef LLAMA_MOD_LAZY

static void lazy_free(ggml_backend_buffer_t buf) {
    munmap(buf->context, buf->size);
}

static void * lazy_base(ggml_backend_buffer_t buf) {
    return buf->context;
}

static void lazy_memset_tensor(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}

static void lazy_set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}

static void lazy_get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}

static bool lazy_cpy_tensor(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (!ggml_backend_buffer_is_host(src->buffer)) {
        return false;
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void lazy_clear(ggml_backend_buffer_t buf, uint8_t value) {
    if (value != 0) {
        memset(buf->context, value, buf->size);
        return;
    }
    // the mapping ends at a page's end
    const size_t page = sysconf(_SC_PAGESIZE);
    llama_mod_kv_decommit(buf, buf->context, (buf->size + page - 1)/page*page);
}

static const ggml_backend_buffer_i lazy_i = {
    /* .free_buffer   = */ lazy_free,
    /* .get_base      = */ lazy_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ lazy_memset_tensor,
    /* .set_tensor    = */ lazy_set_tensor,
    /* .get_tensor    = */ lazy_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ lazy_cpy_tensor,
    /* .clear         = */ lazy_clear,
    /* .reset         = */ nullptr,
};

static const char * lazy_name(ggml_backend_buffer_type_t) {
    return "CPU_Lazy";
}

static ggml_backend_buffer_t lazy_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void * data = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data == MAP_FAILED) {
        return nullptr;
    }
#ifdef MADV_NOHUGEPAGE
    // a huge page would commit 2 MiB for one cell
    madvise(data, size, MADV_NOHUGEPAGE);
#endif
    return ggml_backend_buffer_init(buft, lazy_i, data, size);
}

static size_t lazy_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

static bool lazy_is_host(ggml_backend_buffer_type_t) {
    return true;
}

static ggml_backend_buffer_type_t lazy_buft() {
    static ggml_backend_buffer_type buft = {
        /* .iface = */ {
            /* .get_name       = */ lazy_name,
            /* .alloc_buffer   = */ lazy_alloc,
            /* .get_alignment  = */ lazy_alignment,
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ lazy_is_host,
        },
        /* .device  = */ nullptr,
        /* .context = */ nullptr,
    };
    return &buft;
}

static bool is_lazy(ggml_backend_buffer_t buf) {
    // a model that is only measured has buffers of size 0
    return buf && buf->buft == lazy_buft() && buf->size > 0;
}

#endif // LLAMA_MOD_LAZY

ggml_backend_buffer_type_t llama_mod_kv_buft(ggml_backend_buffer_type_t buft) {
#ifdef LLAMA_MOD_LAZY
    if (buft == ggml_backend_cpu_buffer_type()) {
        return lazy_buft();
    }
#endif
    return buft;
}

size_t llama_mod_kv_committed(ggml_backend_buffer_t buf, const void * data, size_t size) {
#ifdef LLAMA_MOD_LAZY
    if (is_lazy(buf)) {
        const uintptr_t page = sysconf(_SC_PAGESIZE);
        const uintptr_t p0   = (uintptr_t) data / page * page;
        const uintptr_t p1   = ((uintptr_t) data + size + page - 1) / page * page;
#ifdef __APPLE__
        std::vector<char> pages((p1 - p0)/page);
#else
        std::vector<unsigned char> pages((p1 - p0)/page);
#endif
        if (mincore((void *) p0, p1 - p0, pages.data()) == 0) {
            size_t n = 0;
            for (const auto p : pages) {
                n += p & 1;
            }
            return n*page;
        }
    }
#endif
    GGML_UNUSED(buf);
    GGML_UNUSED(data);
    return size;
}

void llama_mod_kv_decommit(ggml_backend_buffer_t buf, void * data, size_t size) {
#ifdef LLAMA_MOD_LAZY
    if (is_lazy(buf)) {
        const uintptr_t page = sysconf(_SC_PAGESIZE);
        const uintptr_t p0   = ((uintptr_t) data + page - 1) / page * page;
        const uintptr_t p1   = ((uintptr_t) data + size) / page * page;
        // private anonymous memory: the next read sees zeros (on Linux; elsewhere they are written)
        if (p1 > p0) {
#ifdef __linux__
            madvise((void *) p0, p1 - p0, MADV_DONTNEED);
#else
            memset((void *) p0, 0, p1 - p0);
#endif
        }
    }
#endif
    GGML_UNUSED(buf);
    GGML_UNUSED(data);
    GGML_UNUSED(size);
}
