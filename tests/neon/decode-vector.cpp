// SPDX-License-Identifier: MIT
//
// Decodes one golden vector with the C codec and compares: decode-vector EQ8|EQ4 N_COLS N_ROWS N_SLABS PAYLOAD CODES.
// A program of its own because Python's binding does not run where the target's processor is emulated.

#include "ggml-entropy.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

static std::vector<char> read(const char * path) {
    std::ifstream file(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(file), {} };
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: decode-vector EQ8|EQ4 N_COLS N_ROWS N_SLABS PAYLOAD CODES\n");
        return 2;
    }
    const ggml_type type  = strcmp(argv[1], "EQ8") == 0 ? GGML_TYPE_EQ8 : GGML_TYPE_EQ4;
    const int64_t   ne[4] = { atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), 1 };

    const std::vector<char> payload  = read(argv[5]);
    const std::vector<char> expected = read(argv[6]);
    if ((int64_t) expected.size() != ne[0]*ne[1]*ne[2]) {
        fprintf(stderr, "%s: %zu codes\n", argv[6], expected.size());
        return 1;
    }

    ggml_entropy_status status = ggml_entropy_validate(type, ne, payload.data(), payload.size());
    const size_t slab_size = payload.size()/ne[2];
    std::vector<int8_t> codes(expected.size());
    for (int64_t i = 0; i < ne[2] && status == GGML_ENTROPY_OK; i++) {
        ggml_entropy_view view;
        status = ggml_entropy_validate_slab(payload.data() + i*slab_size, slab_size, &view);
        if (status == GGML_ENTROPY_OK) {
            status = ggml_entropy_verify_hash(&view);
        }
        if (status == GGML_ENTROPY_OK) {
            status = ggml_entropy_verify_groups(&view, 0, view.n_groups);
        }
        if (status == GGML_ENTROPY_OK) {
            status = ggml_entropy_decode_groups(&view, 0, view.n_groups, codes.data() + i*ne[0]*ne[1]);
        }
    }
    if (status != GGML_ENTROPY_OK) {
        fprintf(stderr, "%s: %s\n", argv[5], ggml_entropy_status_str(status));
        return 1;
    }
    if (memcmp(codes.data(), expected.data(), codes.size()) != 0) {
        fprintf(stderr, "%s: other codes than %s\n", argv[5], argv[6]);
        return 1;
    }
    return 0;
}
