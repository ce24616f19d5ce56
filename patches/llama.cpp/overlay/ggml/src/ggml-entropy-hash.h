// SPDX-License-Identifier: MIT
//
// The hash of a slab (docs/format.md 5.1). Private to ggml-entropy.c and ggml-entropy-encode.c.

#pragma once

#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include "../../vendor/hash/xxhash/xxhash.h"

#include <stdint.h>

#define HASH_FROM 16 // the hash covers the slab from here to its end

static inline uint64_t slab_hash(const void * slab, uint64_t slab_size, uint64_t seed) {
    return XXH64((const uint8_t *) slab + HASH_FROM, slab_size - HASH_FROM, seed);
}
