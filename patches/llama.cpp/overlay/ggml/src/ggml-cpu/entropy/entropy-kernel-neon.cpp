// SPDX-License-Identifier: MIT
//
// Level neon: 64 weights at a time on aarch64, with byte look-ups (tbl) and, if the library is compiled for those of Armv8.2, dot products
// (sdot).
//
// There is no pdep. Its place is taken by ranks: where bit i of a mask is set, its rank is the number of set bits below, and a tbl by ranks
// deals out what stands side by side, one byte for each set bit, to the places of those bits. Ranks come eight at a time from a table of
// all bytes. The steps on one unit (docs/format.md 5.2 has the numbers it works with, ggml-entropy.c draws them):
//
//     raw bits     to bytes r; compared with D they give the mask A of the weights that have a tail
//     tail         bit planes are cut from windows of 64 bits and stay side by side. All that has to wait for the unit before is here:
//                  masks and their counts
//     class        is the sum of all digits. The last digit's planes become bytes, one for each weight that got there; these are dealt out
//                  to the places of the digit before and added to its own bytes, and so on; at last to the places of A
//     code         the class looks up an addend among 16; q = r + addend. Direct weights find 0, and class 0 has their addend
//     far          weights whose class number is beyond the last class; their bytes are patched in
//
// A mask of n bits is dealt out in registers of 16 bytes. Three sizes are compiled: for the few weights that most units have with a tail,
// for twice as many, and for all, with windows of any length.
//
// Products are in entropy-kernel-neon-products.h.

#include "entropy-kernel.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

#include "entropy-kernel-neon-products.h"

namespace {

constexpr int CLAMP = GGML_ENTROPY_CLAMP_UNITS;

// Bits that a window of 64 is sure to hold: it may start at any of the 8 bits of its first byte.
constexpr unsigned WINDOW = 57;

template <int N>
struct bytes {
    uint8x16_t part[N];
};

// Ranks of the set bits of every byte, and for the others an index that stays outside of every table when up to 64 is added.
struct rank_table {
    alignas(64) uint8_t of[256][8] = {};

    constexpr rank_table() {
        for (int mask = 0; mask < 256; mask++) {
            uint8_t rank = 0;
            for (int i = 0; i < 8; i++) {
                of[mask][i] = (mask >> i & 1) != 0 ? rank++ : 128;
            }
        }
    }
};

constexpr rank_table RANKS;

// 64 bits, and how many are set up to the end of each byte.
struct counted {
    uint64_t mask;
    uint64_t until;

    INLINE explicit counted(uint64_t mask) : mask(mask) {
        const uint64_t in_byte = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0);
        until = in_byte*0x0101010101010101;
    }

    INLINE unsigned n() const {
        return (unsigned) (until >> 56);
    }
};

// Bytes 2*part and 2*part + 1 of eight, each eight times.
INLINE uint8x16_t repeat(uint64_t eight, int part) {
    const uint8x16_t which = vcombine_u8(vdup_n_u8((uint8_t) (2*part)), vdup_n_u8((uint8_t) (2*part + 1)));
    return vqtbl1q_u8(vreinterpretq_u8_u64(vdupq_n_u64(eight)), which);
}

INLINE uint8x16_t powers_of_two() {
    return vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
}

// Bits 16*part and so on of a mask: all bits of a byte, or none.
INLINE uint8x16_t to_bytes(uint64_t mask, int part) {
    return vtstq_u8(repeat(mask, part), powers_of_two());
}

// The other way round.
INLINE uint64_t to_mask(const bytes<4> & v) {
    uint8x16_t bit[4];
    for (int i = 0; i < 4; i++) {
        bit[i] = vandq_u8(v.part[i], powers_of_two());
    }
    const uint8x16_t sum = vpaddq_u8(vpaddq_u8(bit[0], bit[1]), vpaddq_u8(bit[2], bit[3]));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sum, sum)), 0);
}

INLINE uint8x16_t look_up(const bytes<1> & table, uint8x16_t index) {
    return vqtbl1q_u8(table.part[0], index);
}

INLINE uint8x16_t look_up(const bytes<2> & table, uint8x16_t index) {
    return vqtbl2q_u8({ { table.part[0], table.part[1] } }, index);
}

INLINE uint8x16_t look_up(const bytes<4> & table, uint8x16_t index) {
    return vqtbl4q_u8({ { table.part[0], table.part[1], table.part[2], table.part[3] } }, index);
}

// start + the next of `from` at every set bit, start elsewhere.
template <int N, int M>
INLINE bytes<N> deal_out(const counted & to, const bytes<M> & from, int start = 0) {
    bytes<N> out;
    for (int i = 0; i < N; i++) {
        const uint8x16_t ranks = vcombine_u8(vld1_u8(RANKS.of[to.mask >> 16*i & 255]), vld1_u8(RANKS.of[to.mask >> (16*i + 8) & 255]));
        out.part[i] = vaddq_u8(look_up(from, vaddq_u8(ranks, repeat(to.until << 8, i))), vdupq_n_u8((uint8_t) start));
    }
    return out;
}

// start + digit, of weights side by side, from the digit's planes.
template <int N>
INLINE bytes<N> digits(int start, uint64_t low, uint64_t high) {
    bytes<N> out;
    for (int i = 0; i < N; i++) {
        const uint8x16_t two = to_bytes(high, i); // -1 twice
        out.part[i] = vsubq_u8(vsubq_u8(vsubq_u8(vdupq_n_u8((uint8_t) start), to_bytes(low, i)), two), two);
    }
    return out;
}

template <int N>
INLINE bytes<N> add(const bytes<N> & a, const bytes<N> & b) {
    bytes<N> sum;
    for (int i = 0; i < N; i++) {
        sum.part[i] = vaddq_u8(a.part[i], b.part[i]);
    }
    return sum;
}

// The bit planes of a unit's tail, side by side as they stand. The first digit has a window of its own, since where the second one starts
// is known early. SLOW takes every plane from memory: for the few units whose tail is longer.
template <bool SLOW>
struct tail_reader {
    const uint8_t * tail;
    uint64_t        pos;
    uint64_t        first;
    uint64_t        rest;
    bool            at_first = true;

    INLINE tail_reader(const uint8_t * tail, uint64_t pos, unsigned n_open) :
            tail(tail), pos(pos), first(fetch(pos)), rest(fetch(pos + n_open)) {}

    INLINE uint64_t fetch(uint64_t at) const {
        uint64_t bits;
        std::memcpy(&bits, tail + (at >> 3), 8);
        bits >>= at & 7;
        if (SLOW && (at & 7) != 0) {
            bits |= (uint64_t) tail[(at >> 3) + 8] << (64 - (at & 7));
        }
        return bits;
    }

    INLINE uint64_t plane(unsigned n) {
        const uint64_t bits = SLOW ? fetch(pos) : at_first ? first : rest;
        pos += n;
        if (!at_first) {
            rest >>= n & 63; // 64 only where the unit is too long
        }
        at_first = false;
        return SLOW && n == 64 ? bits : bits & ~(~UINT64_C(0) << (n & 63));
    }
};

// The tail shapes of docs/format.md 5.2: their planes, and the classes of weights that have a tail, side by side, in registers by twos or
// fours from at most N of each later digit.

struct tail_2_2 {
    static constexpr int N_CLASSES = 6;

    uint64_t a, b, c, d;
    counted  on;

    template <bool SLOW>
    INLINE tail_2_2(tail_reader<SLOW> & w, unsigned n) : a(w.plane(n)), b(w.plane(n)), on(a & b) {
        c = w.plane(on.n());
        d = w.plane(on.n());
    }

    INLINE unsigned n_on() const {
        return on.n();
    }

    INLINE bool any_far() const {
        return (c & d) != 0;
    }

    template <int N>
    INLINE bytes<std::min(2*N, 4)> classes() const {
        constexpr int FIRST = std::min(2*N, 4);
        return add(digits<FIRST>(0, a, b), deal_out<FIRST>(on, digits<N>(0, c, d)));
    }
};

struct tail_1_1_2_2 {
    static constexpr int N_CLASSES = 8;

    counted  a, b;
    uint64_t c, d;
    counted  on;
    uint64_t e, f;

    template <bool SLOW>
    INLINE tail_1_1_2_2(tail_reader<SLOW> & w, unsigned n) :
            a(w.plane(n)), b(w.plane(a.n())), c(w.plane(b.n())), d(w.plane(b.n())), on(c & d), e(w.plane(on.n())), f(w.plane(on.n())) {}

    INLINE unsigned n_on() const {
        return a.n();
    }

    INLINE bool any_far() const {
        return (e & f) != 0;
    }

    template <int N>
    INLINE bytes<std::min(2*N, 4)> classes() const {
        const bytes<N> from_2 = add(digits<N>(1, c, d), deal_out<N>(on, digits<N>(0, e, f)));
        const bytes<N> from_1 = deal_out<N>(b, from_2, 1);
        return deal_out<std::min(2*N, 4)>(a, from_1);
    }
};

// Raw numbers of a unit (5.6); returns where the next one's stand.
template <int RAW_BITS>
INLINE const uint8_t * unpack(const uint8_t * raw, bytes<4> & r) {
    constexpr int pair_at  = RAW_BITS & 4;
    constexpr int plane_at = pair_at + (RAW_BITS & 2);
    for (uint8x16_t & part : r.part) {
        part = vdupq_n_u8(0);
    }
    if (RAW_BITS & 4) {
        for (int i = 0; i < 2; i++) {
            const uint8x16_t v = vld1q_u8(raw + 16*i);
            r.part[i]     = vandq_u8(v, vdupq_n_u8(15));
            r.part[i + 2] = vshrq_n_u8(v, 4);
        }
        raw += 32;
    }
    if (RAW_BITS & 2) {
        // 16 weights at a time have their pairs in bits 0, 2, 4 and 6 of the same 16 bytes: moved to where the number wants them
        const uint8x16_t v = vld1q_u8(raw);
        for (int i = 0; i < 4; i++) {
            const int8x16_t left = vdupq_n_s8((int8_t) (pair_at - 2*i));
            r.part[i] = vbslq_u8(vdupq_n_u8(3 << pair_at), vshlq_u8(v, left), r.part[i]);
        }
        raw += 16;
    }
    if (RAW_BITS & 1) {
        uint64_t plane;
        std::memcpy(&plane, raw, 8);
        for (int i = 0; i < 4; i++) {
            r.part[i] = vbslq_u8(vdupq_n_u8(1 << plane_at), to_bytes(plane, i), r.part[i]);
        }
        raw += 8;
    }
    return raw;
}

// Far weights of a unit, whose class is `far`.
__attribute__((noinline)) void patch_far(bytes<4> of_class, uint8_t far, ggml_entropy_stream * s, int8_t * out) {
    for (uint8x16_t & part : of_class.part) {
        part = vceqq_u8(part, vdupq_n_u8(far));
    }
    for (uint64_t open = to_mask(of_class); open != 0; open &= open - 1) {
        out[__builtin_ctzll(open)] = s->far > s->tail ? (int8_t) *--s->far : 0;
    }
}

// Codes of a unit from its raw numbers and its tail.
template <int N, typename TAIL>
INLINE void finish(const counted & open, const TAIL & tail, const bytes<4> & r, uint8x16_t addends, ggml_entropy_stream * s, int8_t * out) {
    const bytes<4> of_class = deal_out<4>(open, tail.template classes<N>());
    for (int i = 0; i < 4; i++) {
        vst1q_u8((uint8_t *) out + 16*i, vaddq_u8(r.part[i], vqtbl1q_u8(addends, of_class.part[i])));
    }
    if (__builtin_expect(tail.any_far(), 0)) {
        patch_far(of_class, TAIL::N_CLASSES, s, out);
    }
}

// Any unit; returns the position behind it. Kept out of line, so that the loop keeps its registers.
template <typename TAIL>
__attribute__((noinline, cold)) uint64_t finish_slow(
        uint64_t mask, uint64_t pos, bytes<4> r, uint8x16_t addends, ggml_entropy_stream * s, int8_t * out) {
    const counted open(mask);
    tail_reader<true> w(s->tail, pos, open.n());
    const TAIL tail(w, open.n());
    if (tail.n_on() <= 32) {
        finish<2>(open, tail, r, addends, s, out);
    } else {
        finish<4>(open, tail, r, addends, s, out);
    }
    return w.pos;
}

template <int RAW_BITS, typename TAIL>
void decode(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const int direct = (1 << RAW_BITS) - (1 << code->bin_bits);
    uint8_t addend[16] = {};
    for (int c = 0; c < TAIL::N_CLASSES; c++) {
        addend[c] = (uint8_t) (code->class_base[c] - direct); // class 0: base
    }
    const uint8x16_t addends = vld1q_u8(addend);
    const uint8_t *  raw = s->raw;
    uint64_t         pos = s->pos;
    for (int u = 0; u < n_units; u++) {
        if (u % CLAMP == 0) {
            pos = std::min(pos, s->end);
        }
        bytes<4> r;
        raw = unpack<RAW_BITS>(raw, r);
        bytes<4> is_open;
        for (int i = 0; i < 4; i++) {
            is_open.part[i] = vcgeq_u8(r.part[i], vdupq_n_u8((uint8_t) direct));
        }
        const counted open(to_mask(is_open));
        tail_reader<false> w(s->tail, pos, open.n());
        const TAIL tail(w, open.n());
        const bool is_short = open.n() <= WINDOW && w.pos - pos <= open.n() + WINDOW;
        int8_t * to = out + u*UNIT;
        if (is_short && open.n() <= 32 && tail.n_on() <= 16) {
            finish<1>(open, tail, r, addends, s, to);
            pos = w.pos;
        } else if (is_short && tail.n_on() <= 32) {
            finish<2>(open, tail, r, addends, s, to);
            pos = w.pos;
        } else {
            pos = finish_slow<TAIL>(open.mask, pos, r, addends, s, to);
        }
    }
    s->raw   = raw;
    s->pos   = pos;
    s->unit += n_units;
}

// B = 8: bytes as they are, but for the base.
void decode_bytes(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    for (int i = 0; i < n_units*UNIT; i += 16) {
        vst1q_u8((uint8_t *) out + i, vaddq_u8(vld1q_u8(s->raw + i), vdupq_n_u8((uint8_t) code->base)));
    }
    s->raw  += n_units*UNIT;
    s->unit += n_units;
}

template <typename TAIL>
void decode_by_raw_bits(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
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

void decode_units(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    switch (code->tail) {
        case 0:  return decode_bytes(code, s, n_units, out);
        case 1:  return decode_by_raw_bits<tail_2_2>(code, s, n_units, out);
        default: return decode_by_raw_bits<tail_1_1_2_2>(code, s, n_units, out);
    }
}

} // namespace

bool ggml_entropy_kernel_neon(ggml_entropy_kernel * kernel) {
    *kernel = { "neon", decode_units, multiply };
    return true;
}

#else

bool ggml_entropy_kernel_neon(ggml_entropy_kernel *) {
    return false;
}

#endif
