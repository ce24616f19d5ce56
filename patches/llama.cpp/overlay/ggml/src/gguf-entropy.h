// SPDX-License-Identifier: MIT
//
// Sizes of entropy-coded tensors while a GGUF is read. Included by gguf.cpp only.
//
// The tensor info of a GGUF holds type and shape, and for every stock type the size follows from them. Here it does not: it stands in the
// header of the first slab, the first 256 bytes of the tensor's data. So the header is read, through the same reader as everything
// else (a file, a buffer or a callback), checked against type and shape, and the bytes of one slab become nb[2], where ggml_nbytes finds
// them. gguf.cpp's own check, that the offsets of a file are the running sum of its sizes, then also catches a wrong size in the
// header, for all tensors but the last one; for that one the end of the data must be within reach of the reader.
//
// Limits: a reader that holds only the metadata of a file (a prefix) cannot be used for a file with such tensors.

#pragma once

#include "ggml-entropy.h"
#include "ggml-impl.h"

#include <cstdint>

// data_offset: start of the data section; offset: of the tensor in it, already compared with the running sum.
// Sets t.nb and leaves the reader at the end of the tensor. Returns false after one line in the log.
template <typename reader>
static bool gguf_entropy_read_size(const reader & gr, uint64_t data_offset, size_t alignment, uint64_t offset, struct ggml_tensor & t) {
    if (alignment > GGML_ENTROPY_ALIGN) {
        GGML_LOG_ERROR("%s: tensor '%s' of type %s needs general.alignment <= %d, the file has %zu: convert the file again\n",
            __func__, t.name, ggml_type_name(t.type), GGML_ENTROPY_ALIGN, alignment);
        return false;
    }

    const uint64_t begin = data_offset + offset;

    enum ggml_entropy_status status = GGML_ENTROPY_TRUNCATED;
    struct ggml_entropy_header raw;
    struct ggml_entropy_header header;
    if (begin >= data_offset && gr.seek(begin) && gr.read(&raw, sizeof(raw))) {
        status = ggml_entropy_check_header(t.type, t.ne, &raw, &header);
    }
    if (status == GGML_ENTROPY_OK) {
        t.nb[0] = 1;
        t.nb[1] = t.ne[0];
        t.nb[2] = header.slab_size;
        t.nb[3] = header.slab_size*t.ne[2]; // at most 2^46 * 2^16
        if (header.slab_size > SIZE_MAX/t.ne[2] || t.nb[3] > UINT64_MAX - begin || !gr.seek(begin + t.nb[3])) {
            status = GGML_ENTROPY_TRUNCATED;
        }
    }
    if (status != GGML_ENTROPY_OK) {
        // the reason of an old file names the remedy itself
        const char * remedy = status == GGML_ENTROPY_OLD_VERSION ? "" : ": run `entrollm verify FILE`; convert or download the file again";
        GGML_LOG_ERROR("%s: tensor '%s' of type %s: %s%s\n",
            __func__, t.name, ggml_type_name(t.type), ggml_entropy_status_str(status), remedy);
        return false;
    }
    return true;
}
