#include "llama-mod-pool.h"

#include "llama-mod-buffer.h"

// the buffer interface is internal to ggml; the source is pinned
#include "../ggml/src/ggml-backend-impl.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// memory is taken and given back in steps of this size, that of a page of a device
static constexpr size_t POOL_STEP = 2*1024*1024;

// addresses that are reserved at once, if no piece is larger
static constexpr size_t POOL_ARENA = 16ull*1024*1024*1024;

namespace {

struct arena {
    ggml_backend_buffer_t buf;

    std::map<size_t, size_t> free; // offset -> size
    std::vector<uint32_t>    used; // by step: pieces that lie in it

    ~arena() { ggml_backend_buffer_free(buf); }

    char * base() const { return (char *) ggml_backend_buffer_get_base(buf); }

    // commits or releases the steps of a piece that no other piece lies in; false: no memory, nothing changed
    bool add(size_t offset, size_t size) {
        for (size_t i = offset/POOL_STEP; i <= (offset + size - 1)/POOL_STEP; ++i) {
            if (used[i] == 0 && !llama_mod_kv_commit(buf, base() + i*POOL_STEP, POOL_STEP)) {
                if (i > offset/POOL_STEP) {
                    remove(offset, i*POOL_STEP - offset);
                }
                return false;
            }
            used[i]++;
        }
        return true;
    }

    void remove(size_t offset, size_t size) {
        for (size_t i = offset/POOL_STEP; i <= (offset + size - 1)/POOL_STEP; ++i) {
            if (--used[i] == 0) {
                llama_mod_kv_release(buf, base() + i*POOL_STEP, POOL_STEP);
            }
        }
    }

    // the first free range with room; false: none, or no memory
    bool take(size_t size, size_t & offset) {
        for (auto it = free.begin(); it != free.end(); ++it) {
            if (it->second < size) {
                continue;
            }
            offset = it->first;
            if (!add(offset, size)) {
                return false;
            }
            const size_t rest = it->second - size;
            free.erase(it);
            if (rest > 0) {
                free[offset + size] = rest;
            }
            return true;
        }
        return false;
    }

    void give(size_t offset, size_t size) {
        remove(offset, size);

        auto it = free.emplace(offset, size).first;
        if (const auto next = std::next(it); next != free.end() && offset + size == next->first) {
            it->second += next->second;
            free.erase(next);
        }
        if (it != free.begin()) {
            if (const auto prev = std::prev(it); prev->first + prev->second == it->first) {
                prev->second += it->second;
                free.erase(it);
            }
        }
    }
};

struct pool {
    ggml_backend_buffer_type      type;
    ggml_backend_buffer_type_t    buft; // of the pieces
    ggml_backend_buffer_type_t    lazy; // of the arenas
    std::string                   name;
    std::mutex                    mutex;
    std::vector<std::unique_ptr<arena>> arenas;
};

struct piece {
    pool * owner;
    arena * in;
    size_t offset;
    size_t size;
};

} // namespace

static piece & get_piece(ggml_backend_buffer_t buf) {
    return *(piece *) buf->context;
}

static ggml_backend_buffer_t get_arena(ggml_backend_buffer_t buf) {
    return get_piece(buf).in->buf;
}

static void pool_free(ggml_backend_buffer_t buf) {
    auto & p = get_piece(buf);
    {
        std::lock_guard<std::mutex> lock(p.owner->mutex);
        p.in->give(p.offset, p.size);
    }
    delete &p;
}

static void * pool_base(ggml_backend_buffer_t buf) {
    return get_piece(buf).in->base() + get_piece(buf).offset;
}

static void pool_memset_tensor(ggml_backend_buffer_t buf, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    get_arena(buf)->iface.memset_tensor(get_arena(buf), t, value, offset, size);
}

static void pool_set_tensor(ggml_backend_buffer_t buf, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    get_arena(buf)->iface.set_tensor(get_arena(buf), t, data, offset, size);
}

static void pool_get_tensor(ggml_backend_buffer_t buf, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    get_arena(buf)->iface.get_tensor(get_arena(buf), t, data, offset, size);
}

static void pool_clear(ggml_backend_buffer_t buf, uint8_t value) {
    ggml_tensor all = {};
    all.data = pool_base(buf);
    get_arena(buf)->iface.memset_tensor(get_arena(buf), &all, value, 0, buf->size);
}

static const ggml_backend_buffer_i pool_i = {
    /* .free_buffer   = */ pool_free,
    /* .get_base      = */ pool_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ pool_memset_tensor,
    /* .set_tensor    = */ pool_set_tensor,
    /* .get_tensor    = */ pool_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ pool_clear,
    /* .reset         = */ nullptr,
};

static pool & get_pool(ggml_backend_buffer_type_t type) {
    return *(pool *) type->context;
}

static const char * pool_name(ggml_backend_buffer_type_t type) {
    return get_pool(type).name.c_str();
}

static size_t pool_alignment(ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_get_alignment(get_pool(type).buft);
}

static size_t pool_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * t) {
    return ggml_backend_buft_get_alloc_size(get_pool(type).buft, t);
}

static bool pool_is_host(ggml_backend_buffer_type_t type) {
    return ggml_backend_buft_is_host(get_pool(type).buft);
}

static ggml_backend_buffer_t pool_alloc(ggml_backend_buffer_type_t type, size_t size) {
    auto & p = get_pool(type);
    std::lock_guard<std::mutex> lock(p.mutex);

    const size_t n = GGML_PAD(size, ggml_backend_buft_get_alignment(p.buft));

    size_t  offset = 0;
    arena * found  = nullptr;
    for (const auto & a : p.arenas) {
        if (a->take(n, offset)) {
            found = a.get();
            break;
        }
    }
    if (!found) {
        const size_t n_arena = GGML_PAD(std::max(n, POOL_ARENA), POOL_STEP);

        auto * buf = ggml_backend_buft_alloc_buffer(p.lazy, n_arena);
        if (!buf) {
            return nullptr;
        }
        auto a = std::make_unique<arena>();
        a->buf = buf;
        a->free[0] = n_arena;
        a->used.resize(n_arena/POOL_STEP);
        if (!a->take(n, offset)) {
            return nullptr;
        }
        found = a.get();
        p.arenas.push_back(std::move(a));
    }

    return ggml_backend_buffer_init(p.buft, pool_i, new piece { &p, found, offset, n }, size);
}

static std::mutex                              pools_mutex;
static std::map<ggml_backend_buffer_type_t, pool *> pools; // kept as long as the process: buffer types are

ggml_backend_buffer_type_t llama_mod_pool_buft(ggml_backend_buffer_type_t buft) {
    auto * lazy = llama_mod_kv_buft(buft);
    if (lazy == buft) {
        return buft;
    }

    std::lock_guard<std::mutex> lock(pools_mutex);

    auto *& p = pools[buft];
    if (!p) {
        p = new pool;
        p->buft = buft;
        p->lazy = lazy;
        p->name = std::string(ggml_backend_buft_name(buft)) + "_Pool";
        p->type = {
            /* .iface = */ {
                /* .get_name       = */ pool_name,
                /* .alloc_buffer   = */ pool_alloc,
                /* .get_alignment  = */ pool_alignment,
                /* .get_max_size   = */ nullptr,
                /* .get_alloc_size = */ pool_alloc_size,
                /* .is_host        = */ pool_is_host,
            },
            /* .device  = */ buft->device,
            /* .context = */ p,
        };
    }
    return &p->type;
}
