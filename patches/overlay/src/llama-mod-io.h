#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <vector>

// How a kept graph and the host exchange data without waiting for each other more than once.

// The inputs of a graph, in one block of the device's memory that one copy fills from page-locked memory. Left to the
// scheduler, each of them is copied on its own and waits for the device.
class llama_mod_inputs {
public:
    explicit llama_mod_inputs(ggml_backend_t backend) : backend(backend) {}
    ~llama_mod_inputs();

    // gives the inputs of a graph that has been built, and not been allocated, their place; false: out of memory.
    // Those that the backend does not read (tokens, where their embeddings are in host memory) stay the scheduler's
    bool place(ggml_cgraph * gf);

    // runs f, which writes the inputs as if they were in host memory, and starts the copy; wait: until it is finished
    void fill(const std::function<void()> & f, bool wait);

private:
    ggml_backend_t backend;

    struct slot {
        ggml_tensor * t;
        size_t        offset;
    };
    std::vector<slot> slots;

    size_t size = 0;

    ggml_context_ptr        ctx;
    ggml_tensor *           block = nullptr; // I8 [size of the buffers]
    ggml_backend_buffer_ptr dev;
    ggml_backend_buffer_ptr host;
    ggml_backend_event_t    copied = nullptr;

    bool reserve(size_t n);
};

// What is read back from the device: any number of tensors, one wait.
class llama_mod_outputs {
public:
    // size: bytes of all that is read before a call of reset(); false: out of memory
    bool init(ggml_backend_dev_t dev, size_t size);

    // starts a copy; its data is valid after the backend has been synchronized, until reset()
    const void * read(ggml_backend_t backend, const ggml_tensor * t);

    void reset() { used = 0; }

private:
    ggml_backend_buffer_ptr host;
    size_t                  used = 0;
};
