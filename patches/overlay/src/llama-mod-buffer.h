#pragma once

#include "ggml-backend.h"

#include <cstddef>

// KV memory that follows what is stored. On the CPU: the full virtual size is reserved and the operating system
// backs a page when it is first written, so the addresses never change and nothing is ever copied. Clearing the
// buffer gives the pages back. Pages that were never written read as zeros, as attention needs of masked cells.
// Other buffer types, and systems without mmap, are returned as they are.
ggml_backend_buffer_type_t llama_mod_kv_buft(ggml_backend_buffer_type_t buft);

// bytes of [data, data + size) that are backed with memory: by page where the buffer is lazy, else all
size_t llama_mod_kv_committed(ggml_backend_buffer_t buf, const void * data, size_t size);

// gives back the whole pages inside [data, data + size), which read as zeros from then on
void llama_mod_kv_decommit(ggml_backend_buffer_t buf, void * data, size_t size);
