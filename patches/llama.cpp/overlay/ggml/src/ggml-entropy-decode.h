// SPDX-License-Identifier: MIT
//
// The portable decoder, written once and compiled twice: in ggml-base for any processor of its kind (ggml-entropy.c), and in ggml-cpu for
// the instruction set that the backend is built for (ggml-cpu/entropy/entropy-kernel-generic.cpp). ggml-entropy.c draws what it does.

#pragma once

#include "ggml-entropy-impl.h"

#include <string.h>

// ---- bytes in registers ------------------------------------------------------------------------------------------------------------

// Some bytes of a unit in one register: 16 with SSE2, which every x86-64 has, 8 elsewhere. Shifts are those of 64-bit words: what they
// move from one byte to the next is masked away.
#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>

#define PART_SIZE 16
typedef __m128i part;

static inline part part_load(const void * from) {
    return _mm_loadu_si128((const __m128i *) from);
}

static inline void part_store(part v, void * to) {
    _mm_storeu_si128((__m128i *) to, v);
}

static inline part part_of_words(const uint64_t words[PART_SIZE / 8]) {
    return _mm_set_epi64x((long long) words[1], (long long) words[0]);
}

static inline part part_repeat(int n) {
    return _mm_set1_epi8((char) n);
}

// Of bytes whose sums are at most 255.
static inline part part_add(part a, part b) {
    return _mm_add_epi8(a, b);
}

// Of all bytes, modulo 256.
static inline part part_add_modulo(part a, part b) {
    return _mm_add_epi8(a, b);
}

static inline part part_and(part a, part b) {
    return _mm_and_si128(a, b);
}

static inline part part_or(part a, part b) {
    return _mm_or_si128(a, b);
}

static inline part part_left(part v, int n) {
    return _mm_sll_epi64(v, _mm_cvtsi32_si128(n));
}

static inline part part_right(part v, int n) {
    return _mm_srl_epi64(v, _mm_cvtsi32_si128(n));
}

// Bit i: the top bit of byte i.
static inline uint64_t part_top_bits(part v) {
    return (uint64_t) (uint32_t) _mm_movemask_epi8(v);
}
#else
#define PART_SIZE 8
typedef uint64_t part;

static inline part part_load(const void * from) {
    part v;
    memcpy(&v, from, PART_SIZE);
    return v;
}

static inline void part_store(part v, void * to) {
    memcpy(to, &v, PART_SIZE);
}

static inline part part_of_words(const uint64_t words[PART_SIZE / 8]) {
    return words[0];
}

static inline part part_repeat(int n) {
    return (uint8_t) n * UINT64_C(0x0101010101010101);
}

static inline part part_add(part a, part b) {
    return a + b;
}

static inline part part_add_modulo(part a, part b) {
    const uint64_t low = UINT64_C(0x7f7f7f7f7f7f7f7f); // top bits apart, so that nothing is carried into the next byte
    return ((a & low) + (b & low)) ^ ((a ^ b) & ~low);
}

static inline part part_and(part a, part b) {
    return a & b;
}

static inline part part_or(part a, part b) {
    return a | b;
}

static inline part part_left(part v, int n) {
    return v << n;
}

static inline part part_right(part v, int n) {
    return v >> n;
}

static inline uint64_t part_top_bits(part v) {
    return ((v >> 7 & UINT64_C(0x0101010101010101)) * UINT64_C(0x0102040810204080)) >> 56; // gathered in the top byte
}
#endif

#define N_PARTS (UNIT / PART_SIZE)

// Bit i: the top bit of byte i of a unit.
static inline uint64_t top_bits(const part v[N_PARTS]) {
    uint64_t bits = 0;
    for (int i = 0; i < N_PARTS; i++) {
        bits |= part_top_bits(v[i]) << PART_SIZE * i;
    }
    return bits;
}

// Bit at + i of every byte.
static inline part part_field(part v, int at, int n_bits) {
    return part_and(part_right(v, at), part_repeat((1 << n_bits) - 1));
}

// ---- raw bits ----------------------------------------------------------------------------------------------------------------------

// Raw numbers of a unit, one byte each (5.6).
static inline void unpack_raw(int raw_bits, const uint8_t * raw, part r[N_PARTS]) {
    int shift = 0;
    for (int i = 0; i < N_PARTS; i++) {
        r[i] = raw_bits & 8 ? part_load(raw + PART_SIZE * i) : part_repeat(0);
    }
    if (raw_bits & 4) {
        for (int i = 0; i < N_PARTS / 2; i++) {
            const part v = part_load(raw + PART_SIZE * i);
            r[i]               = part_field(v, 0, 4);
            r[i + N_PARTS / 2] = part_field(v, 4, 4);
        }
        raw  += 32;
        shift = 4;
    }
    if (raw_bits & 2) {
        for (int i = 0; i < N_PARTS; i++) {
            const part v = part_load(raw + PART_SIZE * i % 16);
            r[i] = part_or(r[i], part_left(part_field(v, 2 * (PART_SIZE * i / 16), 2), shift));
        }
        raw   += 16;
        shift += 2;
    }
    if (raw_bits & 1) {
        for (int i = 0; i < N_PARTS; i++, raw += PART_SIZE / 8) {
            uint64_t words[PART_SIZE / 8];
            for (int j = 0; j < PART_SIZE / 8; j++) {
                words[j] = raw[j] * UINT64_C(0x0101010101010101) & UINT64_C(0x8040201008040201); // bit k of the byte stays in byte k
            }
            const part carried = part_add(part_of_words(words), part_repeat(127)); // its top bit is set where that bit is
            r[i] = part_or(r[i], part_and(part_right(carried, 7 - shift), part_repeat(1 << shift)));
        }
    }
}

// Bit i: is r[i] at least `direct`? r < 128 and direct <= 127 here.
static inline uint64_t mask_at_least(const part r[N_PARTS], int direct) {
    part v[N_PARTS];
    for (int i = 0; i < N_PARTS; i++) {
        v[i] = part_add(r[i], part_repeat(128 - direct));
    }
    return top_bits(v);
}

// ---- tails -------------------------------------------------------------------------------------------------------------------------

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

// Set bits of each byte.
static inline uint64_t count_bits_of_bytes(uint64_t x) {
    x -= x >> 1 & 0x5555555555555555;
    x  = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    return (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
}

static inline int count_bits(uint64_t x) {
    return (int) (count_bits_of_bytes(x) * 0x0101010101010101 >> 56);
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

// A mask of 8 bits to 8 bytes: where bit i is set, byte i has one bit, that of its rank, the number of set bits below.
#define BIT(m, i)  ((m) >> (i) & 1)
#define SUM2(m, i) (BIT(m, i) + BIT(m, (i) + 1))
#define RANKED(m, i, rank) ((uint64_t) BIT(m, i) << (8 * (i) + (rank)))
#define RANKS(m) ( \
    RANKED(m, 0, 0)                    | RANKED(m, 1, BIT(m, 0))                           | \
    RANKED(m, 2, SUM2(m, 0))           | RANKED(m, 3, SUM2(m, 0) + BIT(m, 2))              | \
    RANKED(m, 4, SUM2(m, 0) + SUM2(m, 2)) | RANKED(m, 5, SUM2(m, 0) + SUM2(m, 2) + BIT(m, 4)) | \
    RANKED(m, 6, SUM2(m, 0) + SUM2(m, 2) + SUM2(m, 4)) | RANKED(m, 7, SUM2(m, 0) + SUM2(m, 2) + SUM2(m, 4) + BIT(m, 6)))
#define RANKS4(m)  RANKS(m),   RANKS((m) + 1),   RANKS((m) + 2),   RANKS((m) + 3)
#define RANKS16(m) RANKS4(m),  RANKS4((m) + 4),  RANKS4((m) + 8),  RANKS4((m) + 12)
#define RANKS64(m) RANKS16(m), RANKS16((m) + 16), RANKS16((m) + 32), RANKS16((m) + 48)
static const uint64_t bit_of_rank[256] = { RANKS64(0), RANKS64(64), RANKS64(128), RANKS64(192) };

// The weights that go on after the first digit, of those that are open: a bit of the plane for each. What pdep does in one instruction:
// eight weights at a time, each looks at the bit of its rank. No branches: how many weights are open cannot be foretold.
static inline uint64_t spread(uint64_t open, uint64_t plane) {
    const uint64_t below = count_bits_of_bytes(open) * 0x0101010101010100; // byte i: open weights before it, at most 56
    part v[N_PARTS];
    for (int i = 0; i < N_PARTS; i++) {
        uint64_t words[PART_SIZE / 8];
        for (int j = 0; j < PART_SIZE / 8; j++) {
            const int at = PART_SIZE * i + 8 * j;
            words[j] = (plane >> (below >> at & 63) & 255) * UINT64_C(0x0101010101010101) & bit_of_rank[open >> at & 255];
        }
        v[i] = part_add(part_of_words(words), part_repeat(127)); // the top bit is set where any is
    }
    return top_bits(v);
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
        uint64_t open, struct unit_planes planes, const uint8_t addend[], int n_single, int n_classes, bool any_far, int8_t * out) {
    uint64_t far = 0;
    for (; open != 0; open &= open - 1) {
        const int i = lowest_bit(open);
        const int c = next_class(&planes, n_single);
        out[i] = (int8_t) (uint8_t) ((uint8_t) out[i] + addend[c]);
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
    uint8_t addend[GGML_ENTROPY_MAX_CLASSES + 1] = { 0 }; // what is added to r + base, by class; 0 for far ones
    for (int c = 0; c < n_classes; c++) {
        addend[c] = (uint8_t) (code->class_base[c] - direct - code->base);
    }
    for (int u = 0; u < n_units; u++, s->unit++, out += UNIT) {
        part r[N_PARTS];
        unpack_raw(code->raw_bits, s->raw, r);
        s->raw += 8 * code->raw_bits;
        if (s->unit % GGML_ENTROPY_CLAMP_UNITS == 0) {
            s->pos = MIN(s->pos, s->end);
        }
        for (int i = 0; i < N_PARTS; i++) {
            part_store(part_add_modulo(r[i], part_repeat(code->base)), out + PART_SIZE * i);
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
            add_classes(open, planes, addend, n_single, n_classes, false, out);
            continue;
        }
        for (uint64_t far = add_classes(open, planes, addend, n_single, n_classes, true, out); far != 0; far &= far - 1) {
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
