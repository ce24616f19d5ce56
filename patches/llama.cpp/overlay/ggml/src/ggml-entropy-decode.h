// SPDX-License-Identifier: MIT
//
// The portable decoder, written once and compiled twice: in ggml-base for any processor of its kind (ggml-entropy.c), and in ggml-cpu for
// the instruction set that the backend is built for (ggml-cpu/entropy/entropy-kernel-generic.cpp). ggml-entropy.c draws what it does.

#pragma once

#include "ggml-entropy-impl.h"

#include <string.h>

#if defined(__SSE2__) || defined(_M_X64)
#define HAVE_SSE2
#include <emmintrin.h>
#endif

// Raw numbers of a unit, one byte each (5.6); fewer than 8 bits of them.
static void unpack_raw(int raw_bits, const uint8_t * raw, uint8_t r[UNIT]) {
    int shift = 0;
    memset(r, 0, UNIT);
    if (raw_bits & 4) {
        for (int i = 0; i < 32; i++) {
            r[i]      = raw[i] & 15;
            r[i + 32] = raw[i] >> 4;
        }
        raw  += 32;
        shift = 4;
    }
    if (raw_bits & 2) {
        // eight bytes at a time: pair `part` of each is moved to the lowest bits, then to its place
        for (int half = 0; half < 2; half++) {
            uint64_t pairs;
            memcpy(&pairs, raw + 8 * half, 8);
            for (int part = 0; part < 4; part++) {
                uint64_t bytes;
                memcpy(&bytes, r + 16 * part + 8 * half, 8);
                bytes |= (pairs >> 2 * part & 0x0303030303030303) << shift;
                memcpy(r + 16 * part + 8 * half, &bytes, 8);
            }
        }
        raw   += 16;
        shift += 2;
    }
    if (raw_bits & 1) {
        for (int part = 0; part < 8; part++) {
            // bit i of eight copies of the byte, moved to the lowest bit of byte i: a byte with one bit set carries into its top bit
            const uint64_t bits = (uint64_t) raw[part] * 0x0101010101010101 & 0x8040201008040201;
            const uint64_t ones = (bits + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
            uint64_t bytes;
            memcpy(&bytes, r + 8 * part, 8);
            bytes |= ones << shift;
            memcpy(r + 8 * part, &bytes, 8);
        }
    }
}

// Bit i: is r[i] at least `direct`? r < 128 and direct <= 127 here.
static uint64_t mask_at_least(const uint8_t r[UNIT], int direct) {
    uint64_t mask = 0;
#ifdef HAVE_SSE2 // every x86-64
    const __m128i last = _mm_set1_epi8((char) (direct - 1));
    for (int part = 0; part < 4; part++) {
        const __m128i more = _mm_cmpgt_epi8(_mm_loadu_si128((const __m128i *) (r + 16 * part)), last);
        mask |= (uint64_t) (uint32_t) _mm_movemask_epi8(more) << 16 * part;
    }
#else
    for (int part = 0; part < 8; part++) {
        uint64_t bytes;
        memcpy(&bytes, r + 8 * part, 8);
        const uint64_t high = (bytes + 0x0101010101010101 * (uint64_t) (128 - direct)) & 0x8080808080808080;
        // gathers the top bits of the bytes in the top byte
        mask |= ((high >> 7) * 0x0102040810204080 >> 56) << 8 * part;
    }
#endif
    return mask;
}

static inline int lowest_bit(uint64_t x) {
#if defined(__GNUC__)
    return __builtin_ctzll(x);
#else
    int n = 0;
    for (; (x & 1) == 0; x >>= 1) {
        n++;
    }
    return n;
#endif
}

static inline int count_bits(uint64_t x) {
    x -= x >> 1 & 0x5555555555555555;
    x  = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    x  = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return (int) (x * 0x0101010101010101 >> 56);
}

// 64 bits of the tail; reads 9 bytes.
static inline uint64_t read_window(const uint8_t * tail, uint64_t pos) {
    const uint8_t * p = tail + (pos >> 3);
    uint64_t low;
    memcpy(&low, p, 8);
    const int shift = pos & 7;
    return low >> shift | (uint64_t) p[8] << 1 << (63 - shift);
}

static inline uint64_t lowest_bits(uint64_t bits, int n) {
    return n < 64 ? bits & ((UINT64_C(1) << n) - 1) : bits;
}

// The next plane of a unit's tail: a bit for each of n open weights. Windows are fetched anew when they are used up.
struct plane_reader {
    const uint8_t * tail;
    uint64_t        pos;
    uint64_t        window;
    int             n_left;
};

static inline uint64_t read_plane(struct plane_reader * p, int n) {
    if (n > p->n_left) {
        p->window = read_window(p->tail, p->pos);
        p->n_left = 64;
    }
    const uint64_t plane = lowest_bits(p->window, n);
    p->window  = n < 64 ? p->window >> n : 0;
    p->n_left -= n;
    p->pos    += n;
    return plane;
}

static_assert(GGML_ENTROPY_N_TAILS == 3, "what follows knows the tail shapes");

// Bit planes of a unit, each with a bit for every weight that is open at its digit. A tail shape is two single bits or none, and then two
// digits of two bits. n_single is a constant wherever it is used, so that each shape has its own code.
struct unit_planes {
    uint64_t single[2];
    uint64_t digit[2][2];
};

static inline struct unit_planes read_planes(struct ggml_entropy_stream * s, int n_single, int n_open) {
    struct unit_planes  p = { { 0, 0 }, { { 0, 0 }, { 0, 0 } } };
    struct plane_reader from = { s->tail, s->pos, 0, 0 };
    for (int i = 0; i < n_single; i++) {
        p.single[i] = read_plane(&from, n_open);
        n_open      = count_bits(p.single[i]);
    }
    for (int i = 0; i < 2; i++) {
        p.digit[i][0] = read_plane(&from, n_open);
        p.digit[i][1] = read_plane(&from, n_open);
        n_open        = count_bits(p.digit[i][0] & p.digit[i][1]);
    }
    s->pos = from.pos;
    return p;
}

// The weights that go on after the first digit, of those that are open: a bit of the plane for each.
static inline uint64_t spread(uint64_t open, uint64_t plane) {
    uint64_t on = 0;
    for (; open != 0; open &= open - 1, plane >>= 1) {
        on |= open & (0 - open) & (0 - (plane & 1));
    }
    return on;
}

// Class of the next open weight, the number of classes if it is far; takes its bits out of all planes but the first. No branches: whether a
// weight goes on cannot be foretold.
static inline int next_class(struct unit_planes * p, int n_single) {
    const uint64_t on1   = n_single > 0 ? p->single[1] & 1 : 1;
    const uint64_t digit = ((p->digit[0][0] & 1) | (p->digit[0][1] & 1) << 1) & (0 - on1);
    const uint64_t on2   = digit >> 1 & digit;
    const uint64_t last  = ((p->digit[1][0] & 1) | (p->digit[1][1] & 1) << 1) & (0 - on2);
    p->single[1]   >>= 1;
    p->digit[0][0] >>= on1;
    p->digit[0][1] >>= on1;
    p->digit[1][0] >>= on2;
    p->digit[1][1] >>= on2;
    return (int) ((n_single > 0 ? 1 + on1 : 0) + digit + last);
}

// Weights of a unit that have a class or are far, by their planes; out holds r + base for all. With `any_far` false none of them is far.
// Returns those that are.
static inline uint64_t add_classes(
        uint64_t open, struct unit_planes planes, const uint8_t r[UNIT], const uint8_t addend[], int n_single, int n_classes, bool any_far,
        int8_t * out) {
    uint64_t far = 0;
    for (; open != 0; open &= open - 1) {
        const int i = lowest_bit(open);
        const int c = next_class(&planes, n_single);
        out[i] = (int8_t) (uint8_t) (r[i] + addend[c]);
        if (any_far) {
            far |= (uint64_t) (c == n_classes) << i;
        }
    }
    return far;
}

// n_single and n_classes are those of the code's tail shape: constants, so that each has code of its own.
static inline void decode_shape(
        const struct ggml_entropy_code * code, struct ggml_entropy_stream * s, int n_units, int8_t * out, int n_single, int n_classes) {
    const int direct = direct_codes(code);
    uint8_t addend[GGML_ENTROPY_MAX_CLASSES + 1] = { 0 }; // what is added to r, by class; 0 for far ones
    for (int c = 0; c < n_classes; c++) {
        addend[c] = (uint8_t) (code->class_base[c] - direct);
    }
    for (int u = 0; u < n_units; u++, s->unit++, out += UNIT) {
        uint8_t r[UNIT];
        unpack_raw(code->raw_bits, s->raw, r);
        s->raw += 8 * code->raw_bits;
        if (s->unit % GGML_ENTROPY_CLAMP_UNITS == 0) {
            s->pos = MIN(s->pos, s->end);
        }
        for (int i = 0; i < UNIT; i++) {
            out[i] = (int8_t) (uint8_t) (r[i] + (uint8_t) code->base);
        }
        uint64_t open = mask_at_least(r, direct);
        if (open == 0) {
            continue;
        }
        const struct unit_planes planes = read_planes(s, n_single, count_bits(open));
        if (n_single > 0) {
            open = spread(open, planes.single[0]); // class 0 of this shape continues the direct codes
        }
        if ((planes.digit[1][0] & planes.digit[1][1]) == 0) {
            add_classes(open, planes, r, addend, n_single, n_classes, false, out);
            continue;
        }
        for (uint64_t far = add_classes(open, planes, r, addend, n_single, n_classes, true, out); far != 0; far &= far - 1) {
            out[lowest_bit(far)] = s->far > s->tail ? (int8_t) *--s->far : 0;
            s->n_far++;
        }
    }
}

static void decode_units(const struct ggml_entropy_code * code, struct ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->tail) {
        case 0:
            for (int i = 0; i < n_units * UNIT; i++) {
                out[i] = (int8_t) (uint8_t) (s->raw[i] + (uint8_t) code->base);
            }
            s->raw  += n_units * UNIT;
            s->unit += n_units;
            break;
        case 1:  decode_shape(code, s, n_units, out, 0, 6); break;
        default: decode_shape(code, s, n_units, out, 2, 8); break;
    }
}
