#pragma once

#include "ggml-backend.h"

#include <cstddef>

// KV memory on demand: address space for everything is reserved, and a range is made usable when it is needed, so the
// addresses never change, nothing is ever copied, and running out of memory is an error that can be handled. Usable
// pages that were never written read as zeros, as attention needs of masked cells.
//
// On the CPU these take no memory, and tensors begin at a page. On a device with virtual memory (CUDA) they do, its
// pages are of 2 MiB, and neighbours share the page between them. Other buffer types, and systems without mmap, are
// returned as they are.
ggml_backend_buffer_type_t llama_mod_kv_buft(ggml_backend_buffer_type_t buft);

// The following take a range inside a tensor; for buffers that are not lazy they do nothing.

// makes the pages of [data, data + size) usable; false: out of memory
bool llama_mod_kv_commit(ggml_backend_buffer_t buf, void * data, size_t size);

// gives back the memory of the whole pages inside, which read as zeros from then on (on a device: does nothing, a page
// without memory cannot be read there)
void llama_mod_kv_discard(ggml_backend_buffer_t buf, void * data, size_t size);

// gives back the whole pages inside, which must be committed before they are touched again
void llama_mod_kv_release(ggml_backend_buffer_t buf, void * data, size_t size);

// bytes of the pages of [data, data + size) that are backed with memory, asked of the system; all if not lazy
size_t llama_mod_kv_backed(ggml_backend_buffer_t buf, const void * data, size_t size);

// would the process get this much memory for other things? true where that cannot be asked
bool llama_mod_has_memory(size_t size);
