// SPDX-License-Identifier: MIT
//
// Decodes one golden vector with the C codec and with every kernel level, and compares: decode-vector EQ8|EQ4 N_COLS N_ROWS N_SLABS NAME
// PAYLOAD CODES. NAME is the tensor's, which the hash takes in. A program of its own because Python's binding does not run where the
// target's processor is emulated.

#include "ggml-entropy.h"
#include "ggml-cpu/entropy/entropy-kernel.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

static std::vector<char> read(const char * path) {
    std::ifstream file(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(file), {} };
}

// Everything that the codec checks of one slab, then its codes, n_rows * n_cols of them.
static ggml_entropy_status decode(const char * slab, size_t slab_size, const char * name, int64_t i_slab, int8_t * codes) {
    ggml_entropy_view view;
    ggml_entropy_status status = ggml_entropy_validate_slab(slab, slab_size, &view);
    if (status == GGML_ENTROPY_OK) {
        status = ggml_entropy_verify_hash(&view, slab, ggml_entropy_seed(name, i_slab));
    }
    if (status == GGML_ENTROPY_OK) {
        status = ggml_entropy_verify_padding(&view, slab);
    }
    if (status == GGML_ENTROPY_OK) {
        status = ggml_entropy_verify_groups(&view, 0, view.n_groups);
    }
    if (status == GGML_ENTROPY_OK) {
        status = ggml_entropy_decode_groups(&view, 0, view.n_groups, codes);
    }
    return status;
}

// The codes of a valid slab by a kernel level.
static void decode(const ggml_entropy_kernel & kernel, const char * slab, size_t slab_size, int8_t * codes) {
    ggml_entropy_view view;
    ggml_entropy_open(slab, slab_size, &view);
    const int64_t n_cols = view.header.n_cols;
    alignas(64) int8_t units[GGML_ENTROPY_MAX_UNITS*GGML_ENTROPY_UNIT];
    for (int64_t group = 0; group < view.n_groups; group++) {
        ggml_entropy_stream stream;
        ggml_entropy_stream_open(&view, group, &stream);
        for (int64_t unit = 0; unit < n_cols/4; unit += GGML_ENTROPY_MAX_UNITS) {
            const int n_units = (int) std::min<int64_t>(GGML_ENTROPY_MAX_UNITS, n_cols/4 - unit);
            kernel.decode(&view.header.code, &stream, n_units, units);
            for (int i = 0; i < n_units*GGML_ENTROPY_UNIT; i++) {
                const int64_t row = GGML_ENTROPY_GROUP_ROWS*group + i % GGML_ENTROPY_UNIT/4;
                const int64_t col = 4*(unit + i/GGML_ENTROPY_UNIT) + i % 4;
                if (row < view.header.n_rows) {
                    codes[row*n_cols + col] = units[i];
                }
            }
        }
    }
}

int main(int argc, char ** argv) {
    if (argc != 8) {
        fprintf(stderr, "usage: decode-vector EQ8|EQ4 N_COLS N_ROWS N_SLABS NAME PAYLOAD CODES\n");
        return 2;
    }
    const ggml_type type  = strcmp(argv[1], "EQ8") == 0 ? GGML_TYPE_EQ8 : GGML_TYPE_EQ4;
    const int64_t   ne[4] = { atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), 1 };
    const char *    name  = argv[5];

    const std::vector<char> payload  = read(argv[6]);
    const std::vector<char> expected = read(argv[7]);
    if ((int64_t) expected.size() != ne[0]*ne[1]*ne[2]) {
        fprintf(stderr, "%s: %zu codes\n", argv[7], expected.size());
        return 1;
    }

    ggml_entropy_status status = ggml_entropy_validate(type, ne, payload.data(), payload.size());
    const size_t slab_size = payload.size()/ne[2];
    std::vector<int8_t> codes(expected.size());
    for (int64_t i = 0; i < ne[2] && status == GGML_ENTROPY_OK; i++) {
        status = decode(payload.data() + i*slab_size, slab_size, name, i, codes.data() + i*ne[0]*ne[1]);
    }
    if (status != GGML_ENTROPY_OK) {
        fprintf(stderr, "%s: %s\n", argv[6], ggml_entropy_status_str(status));
        return 1;
    }
    if (memcmp(codes.data(), expected.data(), codes.size()) != 0) {
        fprintf(stderr, "%s: other codes than %s\n", argv[6], argv[7]);
        return 1;
    }
    std::istringstream levels(ggml_entropy_kernel_names());
    for (std::string level; levels >> level;) {
        for (int64_t i = 0; i < ne[2]; i++) {
            decode(*ggml_entropy_kernel_find(level.c_str()), payload.data() + i*slab_size, slab_size, codes.data() + i*ne[0]*ne[1]);
        }
        if (memcmp(codes.data(), expected.data(), codes.size()) != 0) {
            fprintf(stderr, "%s: other codes than %s at kernel level %s\n", argv[6], argv[7], level.c_str());
            return 1;
        }
    }
    return 0;
}
