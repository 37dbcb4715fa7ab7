#include "llama-mod-buffer.h"

#include "ggml-mod.h"

// the buffer interface is internal to ggml; the source is pinned
#include "../ggml/src/ggml-backend-impl.h"

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#define LLAMA_MOD_LAZY
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#ifdef LLAMA_MOD_LAZY

#ifdef MAP_NORESERVE
static constexpr int LAZY_MAP = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
static constexpr int LAZY_MAP = MAP_PRIVATE | MAP_ANONYMOUS;
#endif

static uintptr_t page_size() {
    static const uintptr_t size = sysconf(_SC_PAGESIZE);
    return size;
}

// a range of pages: all that [data, data + size) touches, or those that lie inside
struct page_range {
    page_range(const void * data, size_t size, bool inside) {
        const uintptr_t page = page_size();
        const uintptr_t a    = (uintptr_t) data;
        const uintptr_t b    = a + size;

        p0 = inside ? (a + page - 1)/page*page : a/page*page;
        p1 = inside ? b/page*page : (b + page - 1)/page*page;
    }

    bool   empty() const { return p0 >= p1; }
    void * data()  const { return (void *) p0; }
    size_t size()  const { return p1 - p0; }

    uintptr_t p0;
    uintptr_t p1;
};

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
    GGML_ASSERT(value == 0);
    // the mapping ends at a page's end
    llama_mod_kv_discard(buf, buf->context, GGML_PAD(buf->size, page_size()));
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
    void * data = mmap(nullptr, size, PROT_NONE, LAZY_MAP, -1, 0);
    if (data == MAP_FAILED) {
        return nullptr;
    }
    return ggml_backend_buffer_init(buft, lazy_i, data, size);
}

// so that no page belongs to two tensors
static size_t lazy_alignment(ggml_backend_buffer_type_t) {
    return page_size();
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

// of the buffer's device, where it has such memory
static const ggml_mod_vmm * get_vmm(ggml_backend_buffer_type_t buft) {
    auto * dev = ggml_backend_buft_get_device(buft);
    auto * reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;

    return reg ? (const ggml_mod_vmm *) ggml_backend_reg_get_proc_address(reg, GGML_MOD_VMM_PROC) : nullptr;
}

static const ggml_mod_vmm * get_vmm(ggml_backend_buffer_t buf) {
    const auto * vmm = buf ? get_vmm(buf->buft) : nullptr;

    return vmm && vmm->is_vmm(buf) ? vmm : nullptr;
}

ggml_backend_buffer_type_t llama_mod_kv_buft(ggml_backend_buffer_type_t buft) {
    if (const auto * vmm = get_vmm(buft)) {
        auto * res = vmm->buffer_type(ggml_backend_buft_get_device(buft));
        return res ? res : buft;
    }
#ifdef LLAMA_MOD_LAZY
    if (buft == ggml_backend_cpu_buffer_type()) {
        return lazy_buft();
    }
#endif
    return buft;
}

bool llama_mod_kv_commit(ggml_backend_buffer_t buf, void * data, size_t size) {
    if (const auto * vmm = get_vmm(buf)) {
        return vmm->commit(buf, data, size);
    }
#ifdef LLAMA_MOD_LAZY
    const page_range r(data, size, /*inside =*/ false);
    if (is_lazy(buf) && !r.empty()) {
        if (mprotect(r.data(), r.size(), PROT_READ | PROT_WRITE) != 0) {
            return false;
        }
#ifdef MADV_NOHUGEPAGE
        // a huge page would commit 2 MiB for one cell
        madvise(r.data(), r.size(), MADV_NOHUGEPAGE);
#endif
    }
#endif
    GGML_UNUSED(buf);
    GGML_UNUSED(data);
    GGML_UNUSED(size);
    return true;
}

void llama_mod_kv_discard(ggml_backend_buffer_t buf, void * data, size_t size) {
#ifdef LLAMA_MOD_LAZY
    const page_range r(data, size, /*inside =*/ true);
    if (is_lazy(buf) && !r.empty()) {
#ifdef __linux__
        // private anonymous memory: the next read sees zeros
        madvise(r.data(), r.size(), MADV_DONTNEED);
#else
        mmap(r.data(), r.size(), PROT_READ | PROT_WRITE, LAZY_MAP | MAP_FIXED, -1, 0);
#endif
    }
#endif
    GGML_UNUSED(buf);
    GGML_UNUSED(data);
    GGML_UNUSED(size);
}

void llama_mod_kv_release(ggml_backend_buffer_t buf, void * data, size_t size) {
    if (const auto * vmm = get_vmm(buf)) {
        vmm->release(buf, data, size);
    }
#ifdef LLAMA_MOD_LAZY
    const page_range r(data, size, /*inside =*/ true);
    if (is_lazy(buf) && !r.empty()) {
        // mapped anew, because the system goes on charging for memory that is only protected
        mmap(r.data(), r.size(), PROT_NONE, LAZY_MAP | MAP_FIXED, -1, 0);
    }
#endif
    GGML_UNUSED(buf);
    GGML_UNUSED(data);
    GGML_UNUSED(size);
}

#ifdef __linux__
// mincore() would count the page of zeros, which a read of a page never written maps
static bool count_pages(const page_range & r, size_t & n) {
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }

    static constexpr uint64_t PRESENT = 1ull << 63;
    static constexpr uint64_t SWAPPED = 1ull << 62;
    static constexpr uint64_t OURS    = 1ull << 56; // mapped here only

    std::vector<uint64_t> pages(r.size()/page_size());
    const size_t  n_bytes = pages.size()*sizeof(uint64_t);
    const ssize_t n_read  = pread(fd, pages.data(), n_bytes, r.p0/page_size()*sizeof(uint64_t));
    close(fd);

    n = 0;
    for (const auto p : pages) {
        n += (p & SWAPPED) || (p & (PRESENT | OURS)) == (PRESENT | OURS);
    }
    return n_read == (ssize_t) n_bytes;
}
#endif

size_t llama_mod_kv_backed(ggml_backend_buffer_t buf, const void * data, size_t size) {
    if (const auto * vmm = get_vmm(buf)) {
        return vmm->backed(buf, data, size);
    }
#ifdef LLAMA_MOD_LAZY
    const page_range r(data, size, /*inside =*/ false);
    if (is_lazy(buf)) {
        if (r.empty()) {
            return 0;
        }
        size_t n = 0;
#ifdef __linux__
        if (count_pages(r, n)) {
            return n*page_size();
        }
        std::vector<unsigned char> pages(r.size()/page_size());
#else
        std::vector<char> pages(r.size()/page_size());
#endif
        if (mincore(r.data(), r.size(), pages.data()) == 0) {
            n = 0;
            for (const auto p : pages) {
                n += p & 1;
            }
            return n*page_size();
        }
    }
#endif
    GGML_UNUSED(buf);
    GGML_UNUSED(data);
    return size;
}

bool llama_mod_has_memory(size_t size) {
#ifdef LLAMA_MOD_LAZY
    // not by malloc(), which would keep what it once had
    void * data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data != MAP_FAILED && munmap(data, size) == 0;
#else
    GGML_UNUSED(size);
    return true;
#endif
}
