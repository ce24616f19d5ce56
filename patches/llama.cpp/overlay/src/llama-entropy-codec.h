// SPDX-License-Identifier: MIT
//
// Work of the model loader with the codec of entropy-coded tensors, by all threads: decoding, verification, and the device layout. Knows
// nothing of models and files; llama-entropy.cpp does.
//
// Work is cut into chunks of whole row groups of one slab, which threads take from a counter: row groups are independent, and a slab of
// a small expert may have fewer of them than there are threads.

#pragma once

#include "../ggml/src/ggml-entropy.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// The slabs of a validated tensor: all have the same shape, modes and sizes.
using llama_entropy_slabs = std::vector<ggml_entropy_view>;

// Memory that tensors use one after the other, so that the system need not bring fresh pages for each.
struct llama_entropy_buffer {
    std::unique_ptr<uint8_t[]> data;
    size_t size = 0;

    // At least n bytes, 16-byte aligned; what was in them is lost.
    uint8_t * of(size_t n) {
        if (size < n) {
            data.reset(); // first, so that both are never there together
            size = 0;
            data.reset(new uint8_t[n]);
            size = n;
        }
        return data.get();
    }
};

// Decode into rows of type plain, slab after slab. Returns the number of threads; *result is what the codec says.
int llama_entropy_decode_slabs(const llama_entropy_slabs & slabs, ggml_type plain, uint8_t * dst, ggml_entropy_status * result);

// Hashes, unused bytes and every code. data: the slabs, slab_size bytes apart; name: of the tensor, which its hashes take in.
ggml_entropy_status llama_entropy_verify_slabs(
    const llama_entropy_slabs & slabs, const uint8_t * data, size_t slab_size, const char * name);

// Brings slabs into the device layout (ggml-entropy-lanes.h), and tells what came of it.
struct llama_entropy_lanes {
    ggml_entropy_status status = GGML_ENTROPY_OK; // what the codec says
    int64_t misfit = -1;                          // number of the first slab that does not fit in device_size
    size_t  needed = 0;                           // bytes that it needs; 0 if a lane gets too long
    int     n_threads = 0;                        // most

    llama_entropy_buffer codes;

    // Slabs that are worth making at a time. Each weight of them takes a byte of memory, beside the slabs in both layouts.
    static int64_t batch(const llama_entropy_slabs & slabs);

    // Make the slabs [slab0, slab1), device_size bytes each, from `to` on, which is 8-byte aligned. False if that cannot be done.
    bool make(const llama_entropy_slabs & slabs, int64_t slab0, int64_t slab1, uint8_t * to);
};
