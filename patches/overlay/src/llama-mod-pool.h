#pragma once

#include "ggml-backend.h"

// Memory for many small buffers that grow: they share pages. Where each K/V head has a cache of its own, there are
// hundreds of these, and on a device whose pages are of 2 MiB each would leave most of its last page empty.
//
// A buffer of this type is a piece of a large buffer of the type that llama_mod_kv_buft() returns: addresses are reserved
// for all of it, a page has memory while some piece lies in it, and pieces that are freed are used again. It says that it
// is of type buft, since all that is done with it on the device is the same. The pool is one for each buft in the
// process. Types without memory on demand are returned as they are.
ggml_backend_buffer_type_t llama_mod_pool_buft(ggml_backend_buffer_type_t buft);
