#include "llama-mod-io.h"

#include "ggml.h"

#include <algorithm>
#include <set>

// page-locked where the device knows such memory
static ggml_backend_buffer_t alloc_host(ggml_backend_dev_t dev, size_t size) {
    auto * buft = ggml_backend_dev_host_buffer_type(dev);
    return ggml_backend_buft_alloc_buffer(buft ? buft : ggml_backend_cpu_buffer_type(), size);
}

llama_mod_inputs::~llama_mod_inputs() {
    ggml_backend_event_free(copied);
}

bool llama_mod_inputs::place(ggml_cgraph * gf) {
    const size_t align = ggml_backend_get_alignment(backend);

    std::vector<ggml_tensor *> found;
    std::set<ggml_tensor *>    seen, elsewhere;

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        auto * node = ggml_graph_node(gf, i);

        bool here = true;
        for (auto * src : node->src) {
            auto * buf = src ? (src->view_src ? src->view_src : src)->buffer : nullptr;
            here = here && !(buf && !ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(buf)));
        }
        for (auto * src : node->src) {
            // inputs are read through views, too
            auto * t = src && src->view_src ? src->view_src : src;
            if (!t || t->op != GGML_OP_NONE || !(t->flags & GGML_TENSOR_FLAG_INPUT) || t->buffer) {
                continue;
            }
            if (!here) {
                elsewhere.insert(t);
            }
            if (seen.insert(t).second) {
                found.push_back(t);
            }
        }
    }

    slots.clear();
    size = 0;
    for (auto * t : found) {
        if (!elsewhere.count(t)) {
            slots.push_back({ t, size });
            size += GGML_PAD(ggml_backend_buft_get_alloc_size(ggml_backend_get_default_buffer_type(backend), t), align);
        }
    }
    if (!reserve(size)) {
        return false;
    }
    for (const auto & s : slots) {
        ggml_backend_tensor_alloc(dev.get(), s.t, (char *) ggml_backend_buffer_get_base(dev.get()) + s.offset);
    }
    return true;
}

bool llama_mod_inputs::reserve(size_t n) {
    if (n == 0 || (dev && ggml_backend_buffer_get_size(dev.get()) >= n)) {
        return true;
    }
    n += n/2; // masks grow with the context

    ggml_backend_synchronize(backend); // a copy may be under way
    block = nullptr;
    dev .reset(ggml_backend_alloc_buffer(backend, n));
    host.reset(alloc_host(ggml_backend_get_device(backend), n));
    if (!dev || !host) {
        dev.reset();
        return false;
    }

    ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    block = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, n);
    ggml_backend_tensor_alloc(dev.get(), block, ggml_backend_buffer_get_base(dev.get()));

    if (!copied) {
        copied = ggml_backend_event_new(ggml_backend_get_device(backend)); // null: copies are finished when they return
    }
    return true;
}

void llama_mod_inputs::fill(const std::function<void()> & f, bool wait) {
    if (slots.empty()) {
        f();
        return;
    }
    if (copied) {
        ggml_backend_event_synchronize(copied); // the copy before, long done
    } else {
        ggml_backend_synchronize(backend);
    }

    auto * const src = (char *) ggml_backend_buffer_get_base(host.get());
    auto * const dst = (char *) ggml_backend_buffer_get_base(dev.get());

    for (const auto & s : slots) {
        s.t->buffer = host.get();
        s.t->data   = src + s.offset;
    }
    f();
    for (const auto & s : slots) {
        s.t->buffer = dev.get();
        s.t->data   = dst + s.offset;
    }

    ggml_backend_tensor_set_async(backend, block, src, 0, size);
    if (copied) {
        ggml_backend_event_record(copied, backend);
    }
    if (wait) {
        ggml_backend_synchronize(backend);
    }
}

bool llama_mod_outputs::init(ggml_backend_dev_t dev, size_t size) {
    host.reset(alloc_host(dev, std::max<size_t>(size, 1)));
    return host != nullptr;
}

const void * llama_mod_outputs::read(ggml_backend_t backend, const ggml_tensor * t) {
    const size_t n = ggml_nbytes(t);
    GGML_ASSERT(used + n <= ggml_backend_buffer_get_size(host.get()));

    auto * dst = (char *) ggml_backend_buffer_get_base(host.get()) + used;
    used += n;

    ggml_backend_tensor_get_async(backend, t, dst, 0, n);
    return dst;
}
