// SPDX-License-Identifier: MIT
//
// The decoder of the levels that have pdep (x86: avx2, avx512), written once over a few vector operations that each of them has its own
// instructions for. A level's file defines TARGET, the attribute with its instruction sets, and includes this.
//
// A step of the decoder, on one unit (docs/format.md 5.2 has the numbers it works with, ggml-entropy.c draws them):
//
//     raw bits     to bytes r; compared with D they give the mask A of the weights that have a tail
//     tail         windows of 64 bits at the position. pdep(window, A) puts the next bits of the stream on the weights of A: a bit plane
//                  for up to 64 weights in one instruction. What stays open is the mask of the next digit; popcounts move the position
//                  on. The planes become three masks of a class number; the one for class 0 is 000, as for direct weights
//     class        masks to bytes; the number looks up an addend among 16; q = r + addend
//     far          rare: patched over the unit's bytes
//
// Only the position makes a unit wait for the one before, and the processor works on the next unit's raw bits meanwhile: two streams in
// turns brought nothing (docs/decisions.md). Nothing is called from the loop, so that all constants stay in registers: a unit whose tail is
// longer than its windows ends it, is decoded out of line, and the loop begins anew.

#pragma once

#include "entropy-kernel.h"

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#define INLINE TARGET inline __attribute__((always_inline))

namespace {

constexpr int UNIT  = GGML_ENTROPY_UNIT;
constexpr int ROWS  = GGML_ENTROPY_GROUP_ROWS;
constexpr int CLAMP = GGML_ENTROPY_CLAMP_UNITS;

// Bits that a window of 64 is sure to hold: it may start at any of the 8 bits of its first byte.
constexpr unsigned WINDOW = 57;

// Tails of a mean length up to this many bits a unit are read through one window, which is less work. Of Gaussian codes (simulated) one
// unit in 45 does not fit in it at a mean of 38 bits, one in nine at 44. Limits of 38, 44 and 50 were equally fast at 38 bits.
constexpr unsigned SHORT_TAIL = 44;

// How far ahead of a unit its streams are asked for, in bytes: groups follow one another in memory, so that this is in the next group or
// two. The processor's own prefetchers lose the streams at the ends of pages and groups. Zen 3, all matrices of SmolLM2 one after the
// other: 1.02 times as fast with 512, 1.05 with 2048, 1.11 with 4096, 1.14 with 8192; with one matrix again and again it makes no
// difference.
constexpr int AHEAD = 8192;

// Bit planes of the class number of 64 weights, and the weights that are far.
struct class_masks {
    uint64_t bit[3];
    uint64_t far;
};

INLINE uint64_t fetch(const uint8_t * bytes, uint64_t pos) {
    uint64_t bits;
    std::memcpy(&bits, bytes + (pos >> 3), 8);
    return bits >> (pos & 7);
}

// Readers of a unit's tail: plane() gives the next plane, for the n weights of open, and fits() tells whether all planes were there.

// The whole tail in one window.
struct one_window {
    uint64_t pos;
    uint64_t bits;

    INLINE one_window(const uint8_t * tail, uint64_t pos, unsigned) : pos(pos), bits(fetch(tail, pos)) {}

    INLINE uint64_t plane(uint64_t open, unsigned n) {
        const uint64_t found = _pdep_u64(bits, open);
        bits >>= n & 63; // 64 only where the unit is too long
        pos   += n;
        return found;
    }

    INLINE bool fits(uint64_t start, unsigned) const {
        return pos - start <= WINDOW;
    }
};

// The first plane has a window of its own: it is as long as all others together, and where the second window starts is known before the
// first is loaded.
struct two_windows {
    uint64_t pos;
    uint64_t first;
    uint64_t rest;
    bool     at_first = true;

    INLINE two_windows(const uint8_t * tail, uint64_t pos, unsigned n_open) :
            pos(pos), first(fetch(tail, pos)), rest(fetch(tail, pos + n_open)) {}

    INLINE uint64_t plane(uint64_t open, unsigned n) {
        const uint64_t found = _pdep_u64(at_first ? first : rest, open);
        if (!at_first) {
            rest >>= n & 63;
        }
        at_first = false;
        pos += n;
        return found;
    }

    INLINE bool fits(uint64_t start, unsigned n_open) const {
        return n_open <= WINDOW && pos - start <= n_open + WINDOW;
    }
};

// Every plane from memory, for any tail.
struct no_window {
    const uint8_t * tail;
    uint64_t        pos;

    INLINE uint64_t plane(uint64_t open, unsigned n) {
        uint64_t bits = fetch(tail, pos);
        if ((pos & 7) != 0) {
            bits |= (uint64_t) tail[(pos >> 3) + 8] << (64 - (pos & 7));
        }
        pos += n;
        return _pdep_u64(bits, open);
    }
};

// The tail shapes of docs/format.md 5.2. number[c] is what the masks of all planes spell for class c; direct weights get 0. Numbers are
// sums of planes without carry, chosen such that the masks take the fewest operations: each plane adds the same to the number wherever it
// is set (in tail_1_1_2_2 a 1, b 5, c 1, d 2, e 4, f 5), and all classes come out different.

struct tail_2_2 {
    static constexpr uint8_t number[] = { 0, 1, 2, 3, 7, 6 };

    template <typename READER>
    static INLINE class_masks read(READER & w, uint64_t open, unsigned n0) {
        const uint64_t a  = w.plane(open, n0);
        const uint64_t b  = w.plane(open, n0);
        const uint64_t on = a & b;
        const unsigned n1 = (unsigned) _mm_popcnt_u64(on);
        const uint64_t c  = w.plane(on, n1);
        const uint64_t d  = w.plane(on, n1);
        return { { a ^ d, b, c ^ d }, c & d };
    }
};

struct tail_1_1_2_2 {
    static constexpr uint8_t number[] = { 0, 1, 4, 5, 6, 7, 3, 2 };

    template <typename READER>
    static INLINE class_masks read(READER & w, uint64_t open, unsigned n0) {
        const uint64_t a  = w.plane(open, n0); // class 0 ends here
        const unsigned n1 = (unsigned) _mm_popcnt_u64(a);
        const uint64_t b  = w.plane(a, n1);    // class 1
        const unsigned n2 = (unsigned) _mm_popcnt_u64(b);
        const uint64_t c  = w.plane(b, n2);    // classes 2 to 4
        const uint64_t d  = w.plane(b, n2);
        const uint64_t on = c & d;
        const unsigned n3 = (unsigned) _mm_popcnt_u64(on);
        const uint64_t e  = w.plane(on, n3);   // classes 5 to 7
        const uint64_t f  = w.plane(on, n3);
        return { { a ^ b ^ c ^ f, d, b ^ e ^ f }, e & f };
    }
};

// Far weights of a unit.
INLINE void patch_far(uint64_t open, ggml_entropy_stream * s, int8_t * out) {
    for (; open != 0; open &= open - 1) {
        out[__builtin_ctzll(open)] = s->far > s->tail ? (int8_t) *--s->far : 0;
    }
}

// VECTORS has 64 bytes as `bytes` and
//
//     VECTORS(addends, last)                   16 addends, and the last raw number of a direct weight
//     unpack<RAW_BITS>(raw, r)                 raw numbers of a unit (5.6); returns where the next one's stand
//     open(r)                                  bit i: is raw number i larger than the last direct one?
//     store(r, bit, out)                       r + addends[class number], whose bits are the masks bit[0..3)
//     add(from, n, out)                        64 bytes from memory, plus n
// A unit of any tail, out of line. Returns the position behind it.
template <typename VECTORS, int RAW_BITS, typename TAIL>
TARGET __attribute__((noinline, cold)) uint64_t decode_long_unit(
        const VECTORS & vectors, const uint8_t * raw, uint64_t pos, ggml_entropy_stream * s, int8_t * out) {
    typename VECTORS::bytes r;
    VECTORS::template unpack<RAW_BITS>(raw, r);
    const uint64_t open = vectors.open(r);
    no_window w = { s->tail, pos };
    const class_masks masks = TAIL::read(w, open, (unsigned) _mm_popcnt_u64(open));
    vectors.store(r, masks.bit, out);
    patch_far(masks.far, s, out);
    return w.pos;
}

template <typename VECTORS, int RAW_BITS, typename TAIL, typename READER>
TARGET void decode(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const int direct = (1 << RAW_BITS) - (1 << code->bin_bits);
    alignas(16) uint8_t addends[16];
    std::memset(addends, code->base, sizeof(addends));
    for (size_t c = 0; c < sizeof(TAIL::number); c++) {
        addends[TAIL::number[c]] = (uint8_t) (code->class_base[c] - direct);
    }
    const VECTORS vectors(addends, direct - 1);

    const uint8_t * const tail = s->tail;
    const uint8_t * raw = s->raw;
    uint64_t        pos = s->pos;
    const uint64_t  end = s->end;
    int8_t *       to   = out;
    int8_t * const last = out + n_units*UNIT;
    while (to != last) {
        do {
            if (__builtin_expect(pos > end, 0)) {
                if ((to - out) % (CLAMP*UNIT) == 0) {
                    pos = end;
                }
                asm("" : "+r"(pos)); // else the compiler makes it a conditional move, which every unit waits for
            }
            // far beyond the slab, too, where there may be nothing: a prefetch reads no memory that is not there
            _mm_prefetch((const char *) raw + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *) tail + (pos >> 3) + AHEAD, _MM_HINT_T0);
            typename VECTORS::bytes r;
            raw = VECTORS::template unpack<RAW_BITS>(raw, r);
            const uint64_t open = vectors.open(r);
            const unsigned n_open = (unsigned) _mm_popcnt_u64(open);
            READER w(tail, pos, n_open);
            const class_masks masks = TAIL::read(w, open, n_open);
            if (__builtin_expect(!w.fits(pos, n_open), 0)) {
                break;
            }
            pos = w.pos;
            vectors.store(r, masks.bit, to);
            if (__builtin_expect(masks.far != 0, 0)) {
                patch_far(masks.far, s, to);
            }
            to += UNIT;
        } while (to != last);
        if (to != last) {
            const VECTORS copy = vectors; // whose address may be given away: the loop's own stays in registers
            pos = decode_long_unit<VECTORS, RAW_BITS, TAIL>(copy, raw - 8*RAW_BITS, pos, s, to);
            to += UNIT;
        }
    }
    s->raw   = raw;
    s->pos   = pos;
    s->unit += n_units;
}

// B = 8: bytes as they are, but for the base.
template <typename VECTORS>
TARGET void decode_bytes(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    for (int u = 0; u < n_units; u++) {
        _mm_prefetch((const char *) s->raw + u*UNIT + AHEAD, _MM_HINT_T0);
        VECTORS::add(s->raw + u*UNIT, code->base, out + u*UNIT);
    }
    s->raw  += n_units*UNIT;
    s->unit += n_units;
}

template <typename VECTORS, typename TAIL, typename READER>
TARGET void decode_by_raw_bits(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->raw_bits) {
        case 1:  return decode<VECTORS, 1, TAIL, READER>(code, s, n_units, out);
        case 2:  return decode<VECTORS, 2, TAIL, READER>(code, s, n_units, out);
        case 3:  return decode<VECTORS, 3, TAIL, READER>(code, s, n_units, out);
        case 4:  return decode<VECTORS, 4, TAIL, READER>(code, s, n_units, out);
        case 5:  return decode<VECTORS, 5, TAIL, READER>(code, s, n_units, out);
        case 6:  return decode<VECTORS, 6, TAIL, READER>(code, s, n_units, out);
        default: return decode<VECTORS, 7, TAIL, READER>(code, s, n_units, out);
    }
}

// The reader by what is left of the group: both read any tail.
template <typename VECTORS, typename TAIL>
TARGET void decode_by_length(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const bool is_short = s->pos < s->end && s->end - s->pos <= SHORT_TAIL*(uint64_t) (s->n_units - s->unit);
    return is_short ? decode_by_raw_bits<VECTORS, TAIL, one_window >(code, s, n_units, out)
                    : decode_by_raw_bits<VECTORS, TAIL, two_windows>(code, s, n_units, out);
}

static_assert(GGML_ENTROPY_N_TAILS == 3, "every tail shape is here");

// What a level's decode is.
template <typename VECTORS>
TARGET void decode_units(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->tail) {
        case 0:  return decode_bytes<VECTORS>(code, s, n_units, out);
        case 1:  return decode_by_length<VECTORS, tail_2_2>(code, s, n_units, out);
        default: return decode_by_length<VECTORS, tail_1_1_2_2>(code, s, n_units, out);
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
