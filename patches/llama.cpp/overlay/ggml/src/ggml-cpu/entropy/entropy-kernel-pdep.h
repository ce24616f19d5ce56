// SPDX-License-Identifier: MIT
//
// The decoder of the levels that have pdep (x86: avx2, avx512), written once over a few vector operations that each of them has its own
// instructions for. A level's file defines TARGET, the attribute with its instruction sets, and includes this.
//
// A step of the decoder, on one unit (docs/format.md 5.2 has the numbers it works with, ggml-entropy.c draws them):
//
//     raw bits     to bytes r; compared with D they give the mask A of the weights that have a tail
//     tail         windows of 64 bits at the position. pdep(window, A) puts the next bits of the stream on the weights of A: a bit plane for
//                  up to 64 weights in one instruction. What stays open is the mask of the next digit; popcounts move the position on.
//                  The planes become three masks of a class number; the one for class 0 is 000, as for direct weights
//     class        masks to bytes; the number looks up an addend among 16; q = r + addend
//     far          rare: a list of the units that have any, whose bytes are patched in behind the loop
//
// Only the position makes a unit wait for the one before, and the processor works on the next unit's raw bits meanwhile: two streams in turns
// brought nothing (docs/decisions.md).

#pragma once

#include "entropy-kernel.h"

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>

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

template <typename TAIL>
struct slow_result {
    class_masks masks;
    uint64_t    pos;
};

// A unit whose tail is longer than its windows. Kept out of line, so that the loop keeps its registers.
template <typename TAIL>
TARGET __attribute__((noinline, cold)) slow_result<TAIL> read_slow(const uint8_t * bytes, uint64_t pos, uint64_t open) {
    const unsigned n_open = (unsigned) _mm_popcnt_u64(open);
    unit_tail<true> w(bytes, pos, n_open);
    const class_masks masks = TAIL::template read<true>(w, open, n_open);
    return { masks, w.pos };
}

// Far weights of the units whose bits are set in `units`.
INLINE void patch_far(uint64_t units, const uint64_t far[], ggml_entropy_stream * s, int8_t * out) {
    for (; units != 0; units &= units - 1) {
        const int u = __builtin_ctzll(units);
        for (uint64_t open = far[u]; open != 0; open &= open - 1) {
            out[u*UNIT + __builtin_ctzll(open)] = s->far > s->tail ? (int8_t) *--s->far : 0;
        }
    }
}

// VECTORS has 64 bytes as `bytes` and
//
//     VECTORS(addends, last)                   16 addends, and the last raw number of a direct weight
//     unpack<RAW_BITS>(raw, r)                 raw numbers of a unit (5.6); returns where the next one's stand
//     open(r)                                  bit i: is raw number i larger than the last direct one?
//     store(r, bit, out)                       r + addends[class number], whose bits are the masks bit[0..3)
//     add(from, n, out)                        64 bytes from memory, plus n
template <typename VECTORS, int RAW_BITS, typename TAIL>
TARGET void decode(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const int direct = (1 << RAW_BITS) - (1 << code->bin_bits);
    alignas(16) uint8_t addends[16];
    std::memset(addends, code->base, sizeof(addends));
    for (size_t c = 0; c < sizeof(TAIL::number); c++) {
        addends[TAIL::number[c]] = (uint8_t) (code->class_base[c] - direct);
    }
    const VECTORS vectors(addends, direct - 1);

    uint64_t far[GGML_ENTROPY_MAX_UNITS];
    uint64_t with_far = 0;
    const uint8_t * const tail = s->tail;
    const uint8_t * raw = s->raw;
    uint64_t        pos = s->pos;
    for (int u0 = 0; u0 < n_units; u0 += CLAMP) {
        pos = std::min(pos, s->end);
        for (int u = u0; u < u0 + CLAMP; u++) {
            typename VECTORS::bytes r;
            raw = VECTORS::template unpack<RAW_BITS>(raw, r);
            const uint64_t open = vectors.open(r);
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
            vectors.store(r, masks.bit, out + u*UNIT);
        }
    }
    s->raw   = raw;
    s->pos   = pos;
    s->unit += n_units;
    patch_far(with_far, far, s, out);
}

// B = 8: bytes as they are, but for the base.
template <typename VECTORS>
TARGET void decode_bytes(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    for (int u = 0; u < n_units; u++) {
        VECTORS::add(s->raw + u*UNIT, code->base, out + u*UNIT);
    }
    s->raw  += n_units*UNIT;
    s->unit += n_units;
}

template <typename VECTORS, typename TAIL>
TARGET void decode_by_raw_bits(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->raw_bits) {
        case 1:  return decode<VECTORS, 1, TAIL>(code, s, n_units, out);
        case 2:  return decode<VECTORS, 2, TAIL>(code, s, n_units, out);
        case 3:  return decode<VECTORS, 3, TAIL>(code, s, n_units, out);
        case 4:  return decode<VECTORS, 4, TAIL>(code, s, n_units, out);
        case 5:  return decode<VECTORS, 5, TAIL>(code, s, n_units, out);
        case 6:  return decode<VECTORS, 6, TAIL>(code, s, n_units, out);
        default: return decode<VECTORS, 7, TAIL>(code, s, n_units, out);
    }
}

static_assert(GGML_ENTROPY_N_TAILS == 3, "every tail shape is here");

// What a level's decode is.
template <typename VECTORS>
TARGET void decode_units(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->tail) {
        case 0:  return decode_bytes<VECTORS>(code, s, n_units, out);
        case 1:  return decode_by_raw_bits<VECTORS, tail_2_2>(code, s, n_units, out);
        default: return decode_by_raw_bits<VECTORS, tail_1_1_2_2>(code, s, n_units, out);
    }
}

// pdep takes some hundred cycles on AMD's processors before Zen 3 (family 25, 0x19), and on Hygon's, which are Zen 1.
bool pdep_is_fast() {
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

bool pdep_is_there() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && pdep_is_fast();
}

} // namespace
