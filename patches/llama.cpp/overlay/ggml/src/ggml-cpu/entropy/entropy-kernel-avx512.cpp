// SPDX-License-Identifier: MIT
//
// Level avx512: a unit is one register, and masks are registers of their own. Two tables of products: with VNNI, and without (Skylake-X).
// The decoder is in entropy-kernel-pdep.h.
//
// Products: vpdpbusd wants one side unsigned. So it takes w + 128, and the sum starts at -128 times the block's sum of activations, which
// comes with the columns. Without VNNI |w| and x with w's sign go through maddubs, as in level avx2.

#include "entropy-kernel.h"

// See entropy-kernel-avx2.cpp for Windows.
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(_WIN32) || defined(__clang__))

// GCC 12 and older warn of their own headers (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#ifndef TARGET_OF // tests define it as nothing where they run this file over an emulation
#define TARGET_OF(sets) __attribute__((target(sets)))
#endif

#define TARGET TARGET_OF("avx512f,avx512bw,bmi,bmi2,popcnt")

#include "entropy-kernel-pdep.h"

namespace {

struct vectors {
    using bytes = __m512i;

    __m512i table;
    __m512i last;

    INLINE vectors(const uint8_t addends[16], int last) :
            table(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) addends))), last(_mm512_set1_epi8((char) last)) {}

    template <int RAW_BITS>
    static INLINE const uint8_t * unpack(const uint8_t * raw, bytes & r) {
        constexpr int pair_at  = RAW_BITS & 4;
        constexpr int plane_at = pair_at + (RAW_BITS & 2);
        r = _mm512_setzero_si512();
        if (RAW_BITS & 4) {
            const __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) raw));
            r = _mm512_and_si512(_mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), _mm512_set1_epi8(15));
            raw += 32;
        }
        if (RAW_BITS & 2) {
            // 16 weights at a time have their pairs in bits 0, 2, 4 and 6 of the same 16 bytes: rotated to where the number wants them
            const __m512i v     = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) raw));
            const __m512i turns = _mm512_add_epi32(
                _mm512_setr_epi32(0, 0, 0, 0, 30, 30, 30, 30, 28, 28, 28, 28, 26, 26, 26, 26), _mm512_set1_epi32(pair_at));
            r = _mm512_or_si512(r, _mm512_and_si512(_mm512_rolv_epi32(v, turns), _mm512_set1_epi8(3 << pair_at)));
            raw += 16;
        }
        if (RAW_BITS & 1) {
            uint64_t mask;
            std::memcpy(&mask, raw, 8);
            r = _mm512_mask_add_epi8(r, mask, r, _mm512_set1_epi8(1 << plane_at));
            raw += 8;
        }
        return raw;
    }

    INLINE uint64_t open(const bytes & r) const {
        return _mm512_cmpgt_epi8_mask(r, last); // raw numbers are below 128
    }

    INLINE void store(const bytes & r, const uint64_t bit[3], int8_t * out) const {
        __m512i number = _mm512_maskz_mov_epi8(bit[0], _mm512_set1_epi8(1));
        number = _mm512_mask_add_epi8(number, bit[1], number, _mm512_set1_epi8(2));
        number = _mm512_mask_add_epi8(number, bit[2], number, _mm512_set1_epi8(4));
        _mm512_store_si512(out, _mm512_add_epi8(r, _mm512_shuffle_epi8(table, number)));
    }

    static INLINE void add(const uint8_t * from, int8_t n, int8_t * out) {
        _mm512_store_si512(out, _mm512_add_epi8(_mm512_loadu_si512(from), _mm512_set1_epi8(n)));
    }
};

} // namespace

// What the two kinds of products differ in. `start` is what a sum of w*x begins with for the block's sum of x, `left` what a register of
// weights becomes once for all columns, `dot` adds the products of 16 rows with the four activations in every dword of x.

namespace plain {

struct product {
    struct weights {
        __m512i   abs;
        __mmask64 negative;
    };

    static INLINE __m512i start(int32_t) {
        return _mm512_setzero_si512();
    }

    static INLINE weights left(__m512i w) {
        return { _mm512_abs_epi8(w), _mm512_movepi8_mask(w) };
    }

    static INLINE __m512i dot(__m512i sum, const weights & w, __m512i x) {
        const __m512i signed_x = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w.abs, signed_x), _mm512_set1_epi16(1)));
    }
};

#include "entropy-kernel-avx512-products.h"

} // namespace plain

#undef TARGET
#define TARGET TARGET_OF("avx512f,avx512bw,avx512vnni,bmi,bmi2,popcnt")

namespace vnni {

struct product {
    struct weights {
        __m512i biased;
    };

    static INLINE __m512i start(int32_t sum_of_x) {
        return _mm512_set1_epi32(-128*sum_of_x);
    }

    static INLINE weights left(__m512i w) {
        return { _mm512_xor_si512(w, _mm512_set1_epi8(-128)) };
    }

    static INLINE __m512i dot(__m512i sum, const weights & w, __m512i x) {
        return _mm512_dpbusd_epi32(sum, w.biased, x);
    }
};

#include "entropy-kernel-avx512-products.h"

} // namespace vnni

bool ggml_entropy_kernel_avx512(ggml_entropy_kernel * kernel) {
    if (!pdep_is_there() || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) {
        return false;
    }
    *kernel = { "avx512", decode_units<vectors>, __builtin_cpu_supports("avx512vnni") ? vnni::multiply : plain::multiply };
    return true;
}

#else

bool ggml_entropy_kernel_avx512(ggml_entropy_kernel *) {
    return false;
}

#endif
