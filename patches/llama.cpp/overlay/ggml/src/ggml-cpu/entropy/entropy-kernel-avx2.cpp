// SPDX-License-Identifier: MIT
//
// Level avx2: a unit of 64 weights at a time, with AVX2 and BMI2, asked of the processor at run time: the file is compiled for them
// whatever the rest is compiled for.
//
// A step of the decoder, on one unit (docs/format.md 5.2 has the numbers it works with, ggml-entropy.c draws them):
//
//     raw bits     to bytes r in two registers of 32; compared with D they give the mask A of the weights that have a tail
//     tail         windows of 64 bits at the position. pdep(window, A) puts the next bits of the stream on the weights of A: a bit plane for
//                  up to 64 weights in one instruction. What stays open is the mask of the next digit; popcounts move the position on.
//                  The planes become three masks of a class number; the one for class 0 is 000, as for direct weights
//     class        masks to bytes; the number looks up an addend among 16 (pshufb); q = r + addend
//     far          rare: a list of the units that have any, whose bytes are patched in behind the loop
//
// Only the position makes a unit wait for the one before, and the processor works on the next unit's raw bits meanwhile: two streams in turns
// brought nothing (docs/decisions.md).
//
// Products: |w| and x with w's sign go through maddubs, pairs of sums through madd: 32 512 at most, no saturation. Lanes are rows.

#include "entropy-kernel.h"

// GCC for Windows keeps the stack aligned to 16 bytes only and spills registers of 32 as if it were aligned to 32 (its bug 54412).
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(_WIN32) || defined(__clang__))

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define TARGET __attribute__((target("avx2,bmi,bmi2,fma,popcnt")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

constexpr int UNIT  = GGML_ENTROPY_UNIT;
constexpr int ROWS  = GGML_ENTROPY_GROUP_ROWS;
constexpr int CLAMP = GGML_ENTROPY_CLAMP_UNITS;

// Bits of a window that are there wherever in its first byte it starts.
constexpr unsigned WINDOW = 57;

// Bit planes of the class number of 64 weights, and the weights that are far.
struct class_masks {
    uint64_t bit[3];
    uint64_t far;
};

// The tail of a unit as its reader sees it. The first plane has a window of its own: it is as long as all others together, and where the
// second window starts is known before the first is loaded. SLOW takes every plane from memory: for the few units whose tail is longer.
template <bool SLOW>
struct unit_tail {
    const uint8_t * bytes;
    uint64_t        pos;
    uint64_t        first;
    uint64_t        rest;
    bool            at_first = true;

    INLINE unit_tail(const uint8_t * bytes, uint64_t pos, unsigned n_open) : bytes(bytes), pos(pos) {
        first = fetch(pos);
        rest  = fetch(pos + n_open);
    }

    INLINE uint64_t fetch(uint64_t at) const {
        uint64_t bits;
        std::memcpy(&bits, bytes + (at >> 3), 8);
        bits >>= at & 7;
        if (SLOW && (at & 7) != 0) {
            bits |= (uint64_t) bytes[(at >> 3) + 8] << (64 - (at & 7));
        }
        return bits;
    }

    // The next plane, for the n weights of open.
    INLINE uint64_t plane(uint64_t open, unsigned n) {
        const uint64_t found = _pdep_u64(SLOW ? fetch(pos) : at_first ? first : rest, open);
        pos += n;
        if (!at_first) {
            rest >>= n & 63; // 64 only where the unit is too long
        }
        at_first = false;
        return found;
    }
};

// The tail shapes of docs/format.md 5.2. number[c] is the class number that masks give class c; 0 is direct weights', too.

struct tail_2_2 {
    static constexpr uint8_t number[] = { 0, 1, 2, 4, 5, 6 };

    template <bool SLOW>
    static INLINE class_masks read(unit_tail<SLOW> & w, uint64_t open, unsigned n0) {
        const uint64_t a  = w.plane(open, n0);
        const uint64_t b  = w.plane(open, n0);
        const uint64_t on = a & b;
        const unsigned n1 = (unsigned) _mm_popcnt_u64(on);
        const uint64_t c  = w.plane(on, n1);
        const uint64_t d  = w.plane(on, n1);
        return { { (a ^ on) | c, (b ^ on) | d, on }, c & d };
    }
};

struct tail_1_1_2_2 {
    static constexpr uint8_t number[] = { 0, 1, 2, 3, 6, 4, 5, 7 };

    template <bool SLOW>
    static INLINE class_masks read(unit_tail<SLOW> & w, uint64_t open, unsigned n0) {
        const uint64_t a  = w.plane(open, n0); // class 0 ends here
        const unsigned n1 = (unsigned) _mm_popcnt_u64(a);
        const uint64_t b  = w.plane(a, n1);    // class 1
        const unsigned n2 = (unsigned) _mm_popcnt_u64(b);
        const uint64_t c  = w.plane(b, n2);
        const uint64_t d  = w.plane(b, n2);
        const uint64_t on = c & d;
        const unsigned n3 = (unsigned) _mm_popcnt_u64(on);
        const uint64_t e  = w.plane(on, n3);
        const uint64_t f  = w.plane(on, n3);
        const uint64_t ends = b ^ on;          // classes 2 to 4
        return { { (a ^ b) | (c & ends) | e | f, ends | f, (d & ends) | on }, e & f };
    }
};

template <typename T>
struct slow_result {
    class_masks masks;
    uint64_t    pos;
};

} // namespace

// 32 mask bits to bytes: `byte` where they are set.
static INLINE __m256i expand(uint32_t mask, __m256i byte) {
    const __m256i spread = _mm256_setr_epi8(0,0,0,0,0,0,0,0, 1,1,1,1,1,1,1,1, 2,2,2,2,2,2,2,2, 3,3,3,3,3,3,3,3);
    const __m256i bits   = _mm256_set1_epi64x((long long) 0x8040201008040201);
    const __m256i bytes  = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) mask), spread), bits);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bits), byte);
}

// Raw numbers of a unit (5.6). Returns where the next one's stand.
template <int RAW_BITS>
static INLINE const uint8_t * unpack(const uint8_t * raw, __m256i r[2]) {
    constexpr int pair_at  = RAW_BITS & 4;
    constexpr int plane_at = pair_at + (RAW_BITS & 2);
    r[0] = r[1] = _mm256_setzero_si256();
    if (RAW_BITS & 4) {
        const __m256i low = _mm256_set1_epi8(15);
        const __m256i v   = _mm256_loadu_si256((const __m256i *) raw);
        r[0] = _mm256_and_si256(v, low);
        r[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        raw += 32;
    }
    if (RAW_BITS & 2) {
        // 16 weights a time stand in bits 0, 2, 4 and 6 of the same 16 bytes: moved to where the number wants them
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
        r[0] = _mm256_or_si256(r[0], _mm256_and_si256(first,  mask));
        r[1] = _mm256_or_si256(r[1], _mm256_and_si256(second, mask));
        raw += 16;
    }
    if (RAW_BITS & 1) {
        const __m256i bit = _mm256_set1_epi8(1 << plane_at);
        uint32_t masks[2];
        std::memcpy(masks, raw, 8);
        r[0] = _mm256_or_si256(r[0], expand(masks[0], bit));
        r[1] = _mm256_or_si256(r[1], expand(masks[1], bit));
        raw += 8;
    }
    return raw;
}

// Bit i: is byte i of the two registers larger? Raw numbers are below 128, so signed comparison does.
static INLINE uint64_t larger(const __m256i r[2], __m256i than) {
    const uint32_t low  = (uint32_t) _mm256_movemask_epi8(_mm256_cmpgt_epi8(r[0], than));
    const uint32_t high = (uint32_t) _mm256_movemask_epi8(_mm256_cmpgt_epi8(r[1], than));
    return low | (uint64_t) high << 32;
}

// A unit whose tail is longer than its windows. Kept out of line, so that the loop keeps its registers.
template <typename TAIL>
static TARGET __attribute__((noinline, cold)) slow_result<TAIL> read_slow(const uint8_t * bytes, uint64_t pos, uint64_t open) {
    const unsigned n_open = (unsigned) _mm_popcnt_u64(open);
    unit_tail<true> w(bytes, pos, n_open);
    const class_masks masks = TAIL::template read<true>(w, open, n_open);
    return { masks, w.pos };
}

// Far weights of the units whose bits are set in `units`.
static INLINE void patch_far(uint64_t units, const uint64_t far[], ggml_entropy_stream * s, int8_t * out) {
    for (; units != 0; units &= units - 1) {
        const int u = __builtin_ctzll(units);
        for (uint64_t open = far[u]; open != 0; open &= open - 1) {
            out[u*UNIT + __builtin_ctzll(open)] = s->far > s->tail ? (int8_t) *--s->far : 0;
        }
    }
}

template <int RAW_BITS, typename TAIL>
static TARGET void decode(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const int direct = (1 << RAW_BITS) - (1 << code->bin_bits);
    alignas(16) uint8_t addends[16];
    std::memset(addends, code->base, sizeof(addends));
    for (size_t c = 0; c < sizeof(TAIL::number); c++) {
        addends[TAIL::number[c]] = (uint8_t) (code->class_base[c] - direct);
    }
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) addends));
    const __m256i last  = _mm256_set1_epi8((char) (direct - 1));
    const __m256i one   = _mm256_set1_epi8(1);
    const __m256i two   = _mm256_set1_epi8(2);
    const __m256i four  = _mm256_set1_epi8(4);

    uint64_t far[GGML_ENTROPY_MAX_UNITS];
    uint64_t with_far = 0;
    const uint8_t * const tail = s->tail;
    const uint8_t * raw = s->raw;
    uint64_t        pos = s->pos;
    for (int u0 = 0; u0 < n_units; u0 += CLAMP) {
        pos = std::min(pos, s->end);
        for (int u = u0; u < u0 + CLAMP; u++) {
            __m256i r[2];
            raw = unpack<RAW_BITS>(raw, r);
            const uint64_t open = larger(r, last);
            const unsigned n_open = (unsigned) _mm_popcnt_u64(open);
            unit_tail<false> w(tail, pos, n_open);
            class_masks masks = TAIL::template read<false>(w, open, n_open);
            if (__builtin_expect(n_open > WINDOW || w.pos - pos > n_open + WINDOW, 0)) {
                const slow_result<TAIL> slow = read_slow<TAIL>(tail, pos, open);
                masks = slow.masks;
                w.pos = slow.pos;
            }
            pos       = w.pos;
            far[u]    = masks.far;
            with_far |= (uint64_t) (masks.far != 0) << u;
            // through memory: a load that broadcasts is one instruction, from a register it takes two
            uint32_t bit[3][2];
            std::memcpy(bit, masks.bit, sizeof(bit));
            asm("" : "+m"(bit));
            for (int half = 0; half < 2; half++) {
                const __m256i number = _mm256_or_si256(
                    _mm256_or_si256(expand(bit[0][half], one), expand(bit[1][half], two)), expand(bit[2][half], four));
                _mm256_store_si256((__m256i *) (out + u*UNIT + 32*half), _mm256_add_epi8(r[half], _mm256_shuffle_epi8(table, number)));
            }
        }
    }
    s->raw   = raw;
    s->pos   = pos;
    s->unit += n_units;
    patch_far(with_far, far, s, out);
}

// B = 8: bytes as they are, but for the base.
static TARGET void decode_bytes(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const __m256i base = _mm256_set1_epi8(code->base);
    for (int i = 0; i < n_units*UNIT; i += 32) {
        _mm256_store_si256((__m256i *) (out + i), _mm256_add_epi8(_mm256_loadu_si256((const __m256i *) (s->raw + i)), base));
    }
    s->raw  += n_units*UNIT;
    s->unit += n_units;
}

template <typename TAIL>
static TARGET void decode_by_raw_bits(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->raw_bits) {
        case 1:  return decode<1, TAIL>(code, s, n_units, out);
        case 2:  return decode<2, TAIL>(code, s, n_units, out);
        case 3:  return decode<3, TAIL>(code, s, n_units, out);
        case 4:  return decode<4, TAIL>(code, s, n_units, out);
        case 5:  return decode<5, TAIL>(code, s, n_units, out);
        case 6:  return decode<6, TAIL>(code, s, n_units, out);
        default: return decode<7, TAIL>(code, s, n_units, out);
    }
}

static_assert(GGML_ENTROPY_N_TAILS == 3, "every tail shape is here");

static void decode_avx2(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->tail) {
        case 0:  return decode_bytes(code, s, n_units, out);
        case 1:  return decode_by_raw_bits<tail_2_2>(code, s, n_units, out);
        default: return decode_by_raw_bits<tail_1_1_2_2>(code, s, n_units, out);
    }
}

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

// pdep takes some hundred cycles on AMD's processors before Zen 3 (family 25, 0x19), and on Hygon's, which are Zen 1.
static bool pdep_is_fast() {
    unsigned eax;
    unsigned ebx;
    unsigned ecx;
    unsigned edx;
    if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) {
        return false;
    }
    char vendor[12];
    std::memcpy(vendor,     &ebx, 4);
    std::memcpy(vendor + 4, &edx, 4);
    std::memcpy(vendor + 8, &ecx, 4);
    if (std::memcmp(vendor, "HygonGenuine", 12) == 0) {
        return false;
    }
    if (std::memcmp(vendor, "AuthenticAMD", 12) != 0) {
        return true;
    }
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);
    const unsigned family = (eax >> 8 & 15) + ((eax >> 8 & 15) == 15 ? eax >> 20 & 255 : 0);
    return family >= 0x19;
}

bool ggml_entropy_kernel_avx2(ggml_entropy_kernel * kernel) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("fma")
            || !__builtin_cpu_supports("popcnt") || !pdep_is_fast()) {
        return false;
    }
    *kernel = { "avx2", decode_avx2, multiply_avx2 };
    return true;
}

#else

bool ggml_entropy_kernel_avx2(ggml_entropy_kernel *) {
    return false;
}

#endif
