// SPDX-License-Identifier: MIT
//
// Level avx2: a unit of 64 weights at a time, with AVX2 and BMI2, asked of the processor at run time: the file is compiled for them
// whatever the rest is compiled for. The decoder is in entropy-kernel-pdep.h.
//
// Products: |w| and x with w's sign go through maddubs, pairs of sums through madd: 32 512 at most, no saturation. Lanes are rows.

#include "entropy-kernel.h"

// GCC for Windows keeps the stack aligned to 16 bytes only and spills registers of 32 as if it were aligned to 32 (its bug 54412).
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(_WIN32) || defined(__clang__))

#define TARGET __attribute__((target("avx2,bmi,bmi2,fma,popcnt")))

#include "entropy-kernel-pdep.h"

// 32 mask bits to bytes: `byte` where they are set.
static INLINE __m256i expand(uint32_t mask, __m256i byte) {
    const __m256i spread = _mm256_setr_epi8(0,0,0,0,0,0,0,0, 1,1,1,1,1,1,1,1, 2,2,2,2,2,2,2,2, 3,3,3,3,3,3,3,3);
    const __m256i bits   = _mm256_set1_epi64x((long long) 0x8040201008040201);
    const __m256i bytes  = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) mask), spread), bits);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bits), byte);
}

// 32 of 64 mask bits to bytes of 0 and 1. Every 8 bytes of mask hold the same 64 bits.
static INLINE __m256i ones_of(__m256i mask, int half) {
    const __m256i spread = half == 0
        ? _mm256_setr_epi8(0,0,0,0,0,0,0,0, 1,1,1,1,1,1,1,1, 2,2,2,2,2,2,2,2, 3,3,3,3,3,3,3,3)
        : _mm256_setr_epi8(4,4,4,4,4,4,4,4, 5,5,5,5,5,5,5,5, 6,6,6,6,6,6,6,6, 7,7,7,7,7,7,7,7);
    const __m256i bits = _mm256_set1_epi64x((long long) 0x8040201008040201);
    return _mm256_min_epu8(_mm256_and_si256(_mm256_shuffle_epi8(mask, spread), bits), _mm256_set1_epi8(1));
}

namespace {

struct vectors {
    struct bytes {
        __m256i half[2];
    };

    __m256i table;
    __m256i last;

    INLINE vectors(const uint8_t addends[16], int last) :
            table(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) addends))), last(_mm256_set1_epi8((char) last)) {}

    template <int RAW_BITS>
    static INLINE const uint8_t * unpack(const uint8_t * raw, bytes & r) {
        constexpr int pair_at  = RAW_BITS & 4;
        constexpr int plane_at = pair_at + (RAW_BITS & 2);
        r.half[0] = r.half[1] = _mm256_setzero_si256();
        if (RAW_BITS & 4) {
            const __m256i low = _mm256_set1_epi8(15);
            const __m256i v   = _mm256_loadu_si256((const __m256i *) raw);
            r.half[0] = _mm256_and_si256(v, low);
            r.half[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            raw += 32;
        }
        if (RAW_BITS & 2) {
            // 16 weights at a time have their pairs in bits 0, 2, 4 and 6 of the same 16 bytes: moved to where the number wants them
            const __m256i v    = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) raw));
            const __m256i mask = _mm256_set1_epi8(3 << pair_at);
            __m256i first;
            __m256i second;
            if (pair_at == 0) {
                first  = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
                second = _mm256_srli_epi16(first, 4);
            } else {
                first  = _mm256_sllv_epi32(v, _mm256_setr_epi32(4, 4, 4, 4, 2, 2, 2, 2));
                second = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
            }
            r.half[0] = _mm256_or_si256(r.half[0], _mm256_and_si256(first,  mask));
            r.half[1] = _mm256_or_si256(r.half[1], _mm256_and_si256(second, mask));
            raw += 16;
        }
        if (RAW_BITS & 1) {
            const __m256i bit = _mm256_set1_epi8(1 << plane_at);
            uint32_t masks[2];
            std::memcpy(masks, raw, 8);
            r.half[0] = _mm256_or_si256(r.half[0], expand(masks[0], bit));
            r.half[1] = _mm256_or_si256(r.half[1], expand(masks[1], bit));
            raw += 8;
        }
        return raw;
    }

    // raw numbers are below 128, so signed comparison does
    INLINE uint64_t open(const bytes & r) const {
        const uint32_t low  = (uint32_t) _mm256_movemask_epi8(_mm256_cmpgt_epi8(r.half[0], last));
        const uint32_t high = (uint32_t) _mm256_movemask_epi8(_mm256_cmpgt_epi8(r.half[1], last));
        return low | (uint64_t) high << 32;
    }

    INLINE void store(const bytes & r, const uint64_t masks[3], int8_t * out) const {
        // through memory: a load that broadcasts is one instruction, from a register it takes two
        uint64_t bit[3] = { masks[0], masks[1], masks[2] };
        asm("" : "+m"(bit[0])); // one at a time, or two are put together first
        asm("" : "+m"(bit[1]));
        asm("" : "+m"(bit[2]));
        const __m256i mask[3] = {
            _mm256_set1_epi64x((long long) bit[0]), _mm256_set1_epi64x((long long) bit[1]), _mm256_set1_epi64x((long long) bit[2])
        };
        for (int half = 0; half < 2; half++) {
            // bits to bytes of 0 and 1, and those to numbers
            const __m256i ones    = ones_of(mask[0], half);
            const __m256i twos    = ones_of(mask[1], half);
            const __m256i fours   = ones_of(mask[2], half);
            const __m256i halved  = _mm256_add_epi8(twos, _mm256_add_epi8(fours, fours));
            const __m256i number  = _mm256_add_epi8(ones, _mm256_add_epi8(halved, halved));
            _mm256_store_si256((__m256i *) (out + 32*half), _mm256_add_epi8(r.half[half], _mm256_shuffle_epi8(table, number)));
        }
    }

    static INLINE void add(const uint8_t * from, int8_t n, int8_t * out) {
        for (int half = 0; half < 2; half++) {
            const __m256i v = _mm256_loadu_si256((const __m256i *) (from + 32*half));
            _mm256_store_si256((__m256i *) (out + 32*half), _mm256_add_epi8(v, _mm256_set1_epi8(n)));
        }
    }
};

} // namespace

// ---- products ----------------------------------------------------------------------------------------------------------------------

// Four products a dword: rows of 8, times the four activations in every dword of x.
static INLINE __m256i dot4(__m256i w_abs, __m256i w, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(w_abs, _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}

// N columns at a time: their integer sums of a block are 2*N registers.
template <int N>
static TARGET void multiply_columns(
        const int8_t * units, int n_blocks, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, float (* sums)[ROWS]) {
    const int8_t * x[N];
    const float  * d[N];
    for (int i = 0; i < N; i++) {
        x[i] = columns.q + index[i]*columns.n_cols + first;
        d[i] = columns.d + index[i]*(columns.n_cols/32) + first/32;
    }
    for (int block = 0; block < n_blocks; block++) {
        __m256i sum[N][2];
        for (int i = 0; i < N; i++) {
            sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        }
        for (int u = 0; u < 8; u++) {
            const __m256i w0 = _mm256_load_si256((const __m256i *) (units + (8*block + u)*UNIT));
            const __m256i w1 = _mm256_load_si256((const __m256i *) (units + (8*block + u)*UNIT + 32));
            const __m256i abs0 = _mm256_abs_epi8(w0);
            const __m256i abs1 = _mm256_abs_epi8(w1);
            for (int i = 0; i < N; i++) {
                int32_t four;
                std::memcpy(&four, x[i] + 32*block + 4*u, 4);
                const __m256i xs = _mm256_set1_epi32(four);
                sum[i][0] = _mm256_add_epi32(sum[i][0], dot4(abs0, w0, xs));
                sum[i][1] = _mm256_add_epi32(sum[i][1], dot4(abs1, w1, xs));
            }
        }
        for (int i = 0; i < N; i++) {
            const __m256 scale = _mm256_broadcast_ss(d[i] + block);
            float * to = sums[i];
            _mm256_store_ps(to,     _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][0]), scale, _mm256_load_ps(to)));
            _mm256_store_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][1]), scale, _mm256_load_ps(to + 8)));
        }
    }
}

static void multiply_avx2(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n, float (* sums)[ROWS]) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        multiply_columns<4>(units, n_units/8, first, columns, index + i, sums + i);
    }
    switch (n - i) {
        case 3: return multiply_columns<3>(units, n_units/8, first, columns, index + i, sums + i);
        case 2: return multiply_columns<2>(units, n_units/8, first, columns, index + i, sums + i);
        case 1: return multiply_columns<1>(units, n_units/8, first, columns, index + i, sums + i);
        default: return;
    }
}

bool ggml_entropy_kernel_avx2(ggml_entropy_kernel * kernel) {
    if (!pdep_is_there() || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return false;
    }
    *kernel = { "avx2", decode_units<vectors>, multiply_avx2 };
    return true;
}

bool ggml_entropy_kernel_avx2_nopdep(ggml_entropy_kernel * kernel) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) {
        return false;
    }
    *kernel = { "avx2-nopdep", ggml_entropy_kernel_generic().decode, multiply_avx2 };
    return true;
}

#else

bool ggml_entropy_kernel_avx2(ggml_entropy_kernel *) {
    return false;
}

bool ggml_entropy_kernel_avx2_nopdep(ggml_entropy_kernel *) {
    return false;
}

#endif
