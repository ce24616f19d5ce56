// SPDX-License-Identifier: MIT
//
// Products of level avx512, for entropy-kernel-avx512.cpp, which includes this once for each TARGET: what is inlined must not have more
// instruction sets than what it goes into. `product` is a struct of that file.

// N columns at a time: their integer sums of a block are N registers.
template <int N>
static TARGET void multiply_columns(
        const int8_t * units, int n_blocks, int64_t first, const ggml_entropy_columns & columns, const int32_t * index,
        float (* sums)[ROWS]) {
    const int8_t  * x[N];
    const float   * d[N];
    const int32_t * s[N];
    for (int i = 0; i < N; i++) {
        const int64_t at = index[i]*(columns.n_cols/32) + first/32;
        x[i] = columns.q + index[i]*columns.n_cols + first;
        d[i] = columns.d + at;
        s[i] = columns.s + at;
    }
    for (int block = 0; block < n_blocks; block++) {
        __m512i sum[N];
        for (int i = 0; i < N; i++) {
            sum[i] = product::start(s[i][block]);
        }
        for (int u = 0; u < 8; u++) {
            const auto w = product::left(_mm512_load_si512(units + (8*block + u)*UNIT));
            for (int i = 0; i < N; i++) {
                int32_t four;
                std::memcpy(&four, x[i] + 32*block + 4*u, 4);
                sum[i] = product::dot(sum[i], w, _mm512_set1_epi32(four));
            }
        }
        for (int i = 0; i < N; i++) {
            const __m512 scale = _mm512_set1_ps(d[i][block]);
            _mm512_store_ps(sums[i], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), scale, _mm512_load_ps(sums[i])));
        }
    }
}

static TARGET void multiply(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n,
        float (* sums)[ROWS]) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        multiply_columns<8>(units, n_units/8, first, columns, index + i, sums + i);
    }
    if (i + 4 <= n) {
        multiply_columns<4>(units, n_units/8, first, columns, index + i, sums + i);
        i += 4;
    }
    switch (n - i) {
        case 3: return multiply_columns<3>(units, n_units/8, first, columns, index + i, sums + i);
        case 2: return multiply_columns<2>(units, n_units/8, first, columns, index + i, sums + i);
        case 1: return multiply_columns<1>(units, n_units/8, first, columns, index + i, sums + i);
        default: return;
    }
}
