// SPDX-License-Identifier: MIT
//
// A kernel level against ref: codes bit-exact for any code and any bits, products to the rounding of float sums. Included by the programs
// that compile a level's own source (tests/avx512, tests/neon).

#pragma once

#include "ggml-cpu/entropy/entropy-kernel.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

class kernel_checks {
public:
    // For any code and any bits: half of the streams are too short for their tails.
    void codes(decltype(ggml_entropy_kernel::decode) decode) {
        for (int round = 0; round < 40; round++) {
            for (int raw_bits = 1; raw_bits < 8; raw_bits++) {
                for (int tail = 1; tail < GGML_ENTROPY_N_TAILS; tail++) {
                    check(same_codes(decode, raw_bits, tail), "codes: raw bits, tail", raw_bits, tail);
                }
            }
            check(same_codes(decode, 8, 0), "codes: bytes", 8, 0);
        }
    }

    // With up to 20 columns.
    void products(decltype(ggml_entropy_kernel::multiply) multiply, const char * what) {
        for (int n = 1; n <= 20; n++) {
            for (int round = 0; round < 10; round++) {
                check(same_products(multiply, n), what, n, round);
            }
        }
    }

    // Tells how it went; the program's exit code.
    int finish() const {
        printf("%d checks, %d wrong\n", n_checks, n_wrong);
        return n_wrong == 0 ? 0 : 1;
    }

private:
    std::mt19937 generator{1};
    int          n_checks = 0;
    int          n_wrong  = 0;

    void check(bool ok, const char * what, int a, int b) {
        n_checks++;
        if (!ok) {
            n_wrong++;
            printf("WRONG: %s, %d, %d\n", what, a, b);
        }
    }

    int between(int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(generator);
    }

    bool same_codes(decltype(ggml_entropy_kernel::decode) decode, int raw_bits, int tail) {
        constexpr int unit = GGML_ENTROPY_UNIT;
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
        std::vector<uint8_t> bytes(raw_size + unit*n_units + 4096);
        for (uint8_t & byte : bytes) {
            for (int bit = 0; bit < 8; bit++) {
                byte |= (uint8_t) ((between(0, 15) < density) << bit);
            }
        }
        const size_t n_tail = (size_t) between(0, unit*n_units);
        ggml_entropy_stream a = {};
        a.raw  = bytes.data();
        a.tail = bytes.data() + raw_size;
        a.far  = a.tail + n_tail;
        a.end  = 8*n_tail;
        ggml_entropy_stream b = a;
        alignas(64) int8_t out[2][GGML_ENTROPY_MAX_UNITS*unit];
        // in two parts, as chunks of a row group come
        const int part = 4*between(0, n_units/4);
        decode(&code, &a, part, out[0]);
        decode(&code, &a, n_units - part, out[0] + part*unit);
        ggml_entropy_kernel_ref().decode(&code, &b, n_units, out[1]);
        return std::memcmp(out[0], out[1], n_units*unit) == 0 && a.raw == b.raw && a.pos == b.pos && a.far == b.far && a.unit == b.unit;
    }

    bool same_products(decltype(ggml_entropy_kernel::multiply) multiply, int n) {
        constexpr int rows = GGML_ENTROPY_GROUP_ROWS;
        const int n_cols  = 32*between(1, 12);
        const int n_units = 8*between(1, n_cols/32);
        const int first   = 32*between(0, n_cols/32 - n_units/8);
        alignas(64) int8_t units[96*GGML_ENTROPY_UNIT];
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
        alignas(64) float sums[2][20][rows];
        for (int i = 0; i < n; i++) {
            for (int row = 0; row < rows; row++) {
                sums[0][i][row] = sums[1][i][row] = (float) between(-5, 5);
            }
        }
        const ggml_entropy_columns columns = { q.data(), d.data(), s.data(), n_cols };
        multiply(units, n_units, first, columns, index.data(), n, sums[0]);
        ggml_entropy_kernel_ref().multiply(units, n_units, first, columns, index.data(), n, sums[1]);
        for (int i = 0; i < n; i++) {
            for (int row = 0; row < rows; row++) {
                if (!(std::fabs(sums[0][i][row] - sums[1][i][row]) <= 0.25f)) { // of sums of up to 96 * 127 * 128
                    return false;
                }
            }
        }
        return true;
    }
};
