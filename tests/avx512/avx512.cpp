// SPDX-License-Identifier: MIT
//
// Kernel level avx512 against ref: codes bit-exact for any bits, products to the rounding of float sums. The kernel's own source is compiled,
// on processors without AVX-512 over SIMDe's emulation (EMULATED).

#include <immintrin.h>

#ifdef EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// SIMDe 0.7.4 gives it the arguments of its masked sister
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
// and lacks this one
static simde__m512 to_floats(simde__m512i v) {
    simde__m512_private  to;
    simde__m512i_private from = simde__m512i_to_private(v);
    for (int i = 0; i < 16; i++) {
        to.f32[i] = (float) from.i32[i];
    }
    return simde__m512_from_private(to);
}
#define _mm512_cvtepi32_ps(a) to_floats(a)
#define TARGET_OF(sets)
#endif

#include "ggml-cpu/entropy/entropy-kernel-avx512.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

static std::mt19937 generator(1);

static int between(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(generator);
}

// Any code and any bits: half of the streams are too short for their tails.
static bool same_codes(int raw_bits, int tail) {
    ggml_entropy_code code = {};
    code.raw_bits = (uint8_t) raw_bits;
    code.bin_bits = (uint8_t) (raw_bits == 8 ? 0 : between(0, raw_bits - 1));
    code.tail     = (uint8_t) tail;
    code.base     = (int8_t) between(-128, 127);
    for (int8_t & base : code.class_base) {
        base = (int8_t) between(-128, 127);
    }
    code.class_base[0] = (int8_t) (code.base + (1 << raw_bits) - (1 << code.bin_bits)); // as a header's check asks
    const int n_units = 8*between(1, GGML_ENTROPY_MAX_UNITS/8);
    const size_t raw_size = (size_t) n_units*8*raw_bits;
    // bits that are mostly ones or mostly zeros make tails of all lengths
    const int density = between(1, 15);
    std::vector<uint8_t> bytes(raw_size + UNIT*n_units + 4096);
    for (uint8_t & byte : bytes) {
        for (int bit = 0; bit < 8; bit++) {
            byte |= (uint8_t) ((between(0, 15) < density) << bit);
        }
    }
    const size_t n_tail = (size_t) between(0, UNIT*n_units);
    ggml_entropy_stream a = {};
    a.raw  = bytes.data();
    a.tail = bytes.data() + raw_size;
    a.far  = a.tail + n_tail;
    a.end  = 8*n_tail;
    ggml_entropy_stream b = a;
    alignas(64) int8_t out[2][GGML_ENTROPY_MAX_UNITS*UNIT];
    // in two parts, as chunks of a row group come
    const int part = 4*between(0, n_units/4);
    decode_units<vectors>(&code, &a, part, out[0]);
    decode_units<vectors>(&code, &a, n_units - part, out[0] + part*UNIT);
    ggml_entropy_kernel_ref().decode(&code, &b, n_units, out[1]);
    return std::memcmp(out[0], out[1], n_units*UNIT) == 0 && a.raw == b.raw && a.pos == b.pos && a.far == b.far && a.unit == b.unit;
}

template <typename MULTIPLY>
static bool same_products(const MULTIPLY & multiply, int n) {
    const int n_cols  = 32*between(1, 12);
    const int n_units = 8*between(1, n_cols/32);
    const int first   = 32*between(0, n_cols/32 - n_units/8);
    alignas(64) int8_t units[96*UNIT];
    for (int8_t & w : units) {
        w = (int8_t) between(-128, 127);
    }
    std::vector<int8_t>  q(n*n_cols);
    std::vector<float>   d(n*n_cols/32);
    std::vector<int32_t> s(n*n_cols/32);
    for (size_t i = 0; i < q.size(); i++) {
        q[i] = (int8_t) between(-127, 127);
        s[i/32] += q[i];
    }
    for (float & scale : d) {
        scale = (float) between(1, 1000)/1024;
    }
    std::vector<int32_t> index(n);
    for (int32_t & i : index) {
        i = between(0, n - 1);
    }
    alignas(64) float sums[2][20][ROWS];
    for (int i = 0; i < n; i++) {
        for (int row = 0; row < ROWS; row++) {
            sums[0][i][row] = sums[1][i][row] = (float) between(-5, 5);
        }
    }
    const ggml_entropy_columns columns = { q.data(), d.data(), s.data(), n_cols };
    multiply(units, n_units, first, columns, index.data(), n, sums[0]);
    ggml_entropy_kernel_ref().multiply(units, n_units, first, columns, index.data(), n, sums[1]);
    for (int i = 0; i < n; i++) {
        for (int row = 0; row < ROWS; row++) {
            if (!(std::fabs(sums[0][i][row] - sums[1][i][row]) <= 0.25f)) { // of sums of up to 96 * 127 * 128
                return false;
            }
        }
    }
    return true;
}

int main() {
    int n_checks = 0;
    int n_wrong  = 0;
    const auto check = [&](bool ok, const char * what, int a, int b) {
        n_checks++;
        if (!ok) {
            n_wrong++;
            printf("WRONG: %s, %d, %d\n", what, a, b);
        }
    };
    for (int round = 0; round < 40; round++) {
        for (int raw_bits = 1; raw_bits < 8; raw_bits++) {
            for (int tail = 1; tail < GGML_ENTROPY_N_TAILS; tail++) {
                check(same_codes(raw_bits, tail), "codes: raw bits, tail", raw_bits, tail);
            }
        }
        check(same_codes(8, 0), "codes: bytes", 8, 0);
    }
    for (int n = 1; n <= 20; n++) {
        for (int round = 0; round < 10; round++) {
            check(same_products(vnni::multiply, n), "products with VNNI: columns", n, round);
            check(same_products(plain::multiply, n), "products without VNNI: columns", n, round);
        }
    }
    printf("%d checks, %d wrong\n", n_checks, n_wrong);
    return n_wrong == 0 ? 0 : 1;
}
