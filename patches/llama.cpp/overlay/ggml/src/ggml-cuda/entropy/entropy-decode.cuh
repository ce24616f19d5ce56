// SPDX-License-Identifier: MIT
//
// Decoding a tile with a warp: lane = row, one unit (32 columns) after the other (docs/format.md 8.4).
//
// The table stands in shared memory 32 times, once per bank, so that 32 lanes look up 32 entries without a conflict. An entry is
// (bias << 16) + t. Shifts take their count mod 32, so the entry itself shifts by t; and a position that adds entries up holds the bit
// position in its low 16 bits (1024 codes of at most 15 bits: 15360) whatever piles up above them.
//
//     window    tttttttt tttt.... ........ ........   32 bits of the lane's stream
//     value     = window >> (32 - t)                  the first t bits
//     z         = (value << 16) + entry               byte 2 is (value + bias) mod 256, the symbol; byte_perm packs four
//
// Words come to a ring in shared memory ahead of time: word j of all lanes is row j mod 32 of the ring, a row has 32 words, and rows 0 and
// 1 stand again behind row 31, because a window reads three rows. Full word rows of the tile have the same shape, so 16 bytes a thread copy
// four of them; of a ragged row the lanes that have a word fetch their own.
//
// One ring serves 32 lanes as long as they stay close. Rows whose lanes differ much in length drift apart, a lane at row j and another at j
// + 20: then the ring cannot hold what both need, and the tile goes on with words read straight from global memory. That is slow (some 3
// times) and always right; docs/cuda.md says when it happens.
//
// Damaged streams: rows are masked to the ring, or checked against the lane's length; positions stay below 2^16. Nothing else is indexed by
// stream bits.

#pragma once

#include "entropy-slab.cuh"

static constexpr int ENTROPY_TABLE_SIZE = 256*ENTROPY_LANES*4; // at the start of shared memory
static constexpr int ENTROPY_ROW_SIZE   = ENTROPY_LANES*4;
static constexpr int ENTROPY_RING_ROWS  = 32;
static constexpr int ENTROPY_RING_SIZE  = (ENTROPY_RING_ROWS + 2)*ENTROPY_ROW_SIZE;
static constexpr int ENTROPY_MAX_T      = 15;

// Fill the table; all threads of the block, which must synchronise before it is used.
ENTROPY_DEVICE void entropy_fill_table(const entropy_slab & slab) {
    const uint16_t * entries = slab.section<uint16_t>(slab.header()->table_at);
    for (int i = threadIdx.x; i < 256*ENTROPY_LANES/4; i += blockDim.x) {
        const uint32_t raw   = global_load(entries + i/(ENTROPY_LANES/4)); // t, then bias
        const uint32_t entry = (raw >> 8 << 16) + (raw & 255);
        shared_store<uint4>(i*16, make_uint4(entry, entry, entry, entry));
    }
}

// ---- where words come from ---------------------------------------------------------------------------------------------------------

struct entropy_ring {
    uint32_t         base;      // of the warp's ring
    uint32_t         column;    // of the lane that this thread decodes, in row 0
    uint32_t         to_full;   // where this thread copies to in rows 0 to 3, and in row 0
    uint32_t         to_tail;
    uint32_t         below;     // lanes before this one
    const uint32_t * full;      // what this thread copies next of the full rows
    const uint32_t * words;     // of the tile
    const uint32_t * tail;      // start of the next ragged row
    static constexpr uint32_t size    = ENTROPY_RING_ROWS*32;
    // a code has at most 15 bits, and a window reads up to two words behind the one it begins in
    static constexpr int32_t  n_ahead = 32*ENTROPY_MAX_T + 2*32;
    uint32_t length;
    // Rows are counted in bits of a lane, 32 a row, so that positions compare with them.
    uint32_t lane_end;          // of this thread's lane
    uint32_t full_end;          // of the rows that every lane has, a multiple of 4 rows
    uint32_t end;               // of the longest lane
    uint32_t asked = 0;         // end of the rows that were asked for; behind every position once all have landed

    ENTROPY_MEMBER entropy_ring(const entropy_tile & tile, uint32_t base, int n_lanes) : base(base), words(tile.words), length(tile.length) {
        const int lane = lane_id();
        // a row that does not exist decodes what lane 0 decodes, and nobody looks at it
        column    = keep(base + (lane < n_lanes ? lane : 0)*4);
        to_full   = keep(async_base() + base + lane*16);
        to_tail   = keep(async_base() + base + lane*4);
        below     = keep((1u << lane) - 1);
        lane_end  = length*32;
        full_end  = (warp_min(length) & ~3u)*32;
        end       = warp_max(length)*32;
        full      = words + lane*4;
        tail      = words + full_end/32*ENTROPY_LANES;
    }

    // The first words are on their way from here on; `advance` finds them asked for.
    ENTROPY_MEMBER void start() {
        ask(size);
        async_commit();
    }

    // Copy what stands before limit, as far as there is anything.
    ENTROPY_MEMBER void ask(uint32_t limit) {
        const uint32_t full_limit = limit < full_end ? limit : full_end;
        ENTROPY_NOUNROLL
        for (; asked + 4*32 <= full_limit; asked += 4*32) {
            const uint32_t row = asked % size;
            const uint32_t to  = multiply_add(row, ENTROPY_ROW_SIZE/32, to_full);
            async_copy<16>(to, full);
            // of four rows, 16 lanes copy rows 0 and 1
            async_copy<16>(to + ENTROPY_RING_ROWS*ENTROPY_ROW_SIZE, full, row == 0 && below < 0xFFFF);
            full += 4*ENTROPY_LANES;
        }
        if (asked < full_end) {
            return;
        }
        limit = limit < end ? limit : end;
        ENTROPY_NOUNROLL
        for (; asked + 32 <= limit; asked += 32) {
            const bool     mine = asked < lane_end;
            const uint32_t mask = warp_ballot(mine);
            const uint32_t row  = asked % size;
            const uint32_t to   = multiply_add(row, ENTROPY_ROW_SIZE/32, to_tail);
            const uint32_t * from = tail + count_bits(mask & below);
            async_copy<4>(to, from, mine);
            async_copy<4>(to + ENTROPY_RING_ROWS*ENTROPY_ROW_SIZE, from, mine && row < 2*32);
            tail += count_bits(mask);
        }
    }

    // Make the words of the next 32 codes ready. False if the lanes have drifted too far apart.
    ENTROPY_MEMBER bool advance(uint32_t position) {
        position &= 0xFFFF;
        const uint32_t before = asked;
        // A lane that is at a position has read all rows before it. Rows begin at multiples of 32, so the position need not be rounded.
        ask(warp_min(position) + size);
        // Committed even when empty, which is cheaper than a test. What is needed now was asked for in an earlier call.
        async_commit();
        async_wait<1>(); // all but what was asked for just now
        if (warp_any((int32_t) position > (int32_t) before - n_ahead)) {
            if (asked < end && warp_any((int32_t) position > (int32_t) asked - n_ahead)) {
                return false;
            }
            async_wait<0>();
            if (asked >= end) {
                asked = 1 << 30; // behind every position: nothing is waited for any more
            }
        }
        warp_sync(); // what one thread copied all may read
        return true;
    }

    ENTROPY_MEMBER void three_words(uint32_t position, uint32_t & w0, uint32_t & w1, uint32_t & w2) const {
        const uint32_t at = multiply_add(position & (ENTROPY_RING_ROWS - 1)*32, ENTROPY_ROW_SIZE/32, column);
        w0 = shared_read<uint32_t>(at);
        w1 = shared_read<uint32_t>(at + ENTROPY_ROW_SIZE);
        w2 = shared_read<uint32_t>(at + 2*ENTROPY_ROW_SIZE);
    }
};

// Words straight from global memory; which word stands where is kept in the memory of the ring, which is not needed any more.
struct entropy_direct {
    uint32_t         masks;  // u32 [256]: lanes that have a word j
    uint32_t         begins; // u16 [256]: where word row j begins
    const uint32_t * words;
    uint32_t         length;
    uint32_t         below;  // lanes before this one

    ENTROPY_MEMBER entropy_direct(const entropy_ring & ring, int n_lanes) : masks(ring.base), begins(ring.base + 256*4), words(ring.words) {
        const int lane = lane_id();
        async_wait<0>();
        warp_sync(); // the ring is at rest
        uint32_t begin = 0;
        for (uint32_t j = 0; j < ring.end/32; j++) {
            const uint32_t mask = warp_ballot(j < ring.length);
            if (lane == 0) {
                shared_store<uint32_t>(masks + j*4, mask);
                shared_store<uint16_t>(begins + j*2, (uint16_t) begin); // at most 255*32
            }
            begin += count_bits(mask);
        }
        warp_sync();
        length = lane < n_lanes ? ring.length : 0; // then all words are zero
        below  = ring.below;
    }

    ENTROPY_MEMBER uint32_t word(uint32_t j) const {
        return j < length ? global_load(words + shared_read<uint16_t>(begins + j*2) + count_bits(shared_read<uint32_t>(masks + j*4) & below)) : 0;
    }

    ENTROPY_MEMBER void three_words(uint32_t position, uint32_t & w0, uint32_t & w1, uint32_t & w2) const {
        const uint32_t j = (position & 0xFFFF)/32;
        w0 = word(j);
        w1 = word(j + 1);
        w2 = word(j + 2);
    }
};

// ---- codes -------------------------------------------------------------------------------------------------------------------------

// Index (the first 8 bits) and bank (4 bytes a lane) are put together by a dot product of bytes: that is one instruction instead of a
// shift and a mask, and of those that multiply, while shifts and masks are what there is most of here.
ENTROPY_DEVICE uint32_t entropy_look_up(uint32_t bank, uint32_t window) {
    return shared_read<uint32_t>(high_byte_multiply_add<ENTROPY_LANES*4>(window, bank));
}

ENTROPY_DEVICE uint32_t entropy_value(uint32_t window, uint32_t entry) {
    return funnel_left(window, 0, entry)*65536 + entry;
}

// Four symbols, the first in the lowest byte. Two codes fit in a window of 32 bits, so one reads codes 0 and 1 and another, a few bits
// further on, codes 2 and 3.
template <typename Words>
ENTROPY_DEVICE uint32_t entropy_four(const Words & words, uint32_t bank, uint32_t & position) {
    uint32_t w0, w1, w2;
    words.three_words(position, w0, w1, w2);
    const uint32_t high = funnel_left(w1, w0, position);
    const uint32_t low  = funnel_left(w2, w1, position);

    const uint32_t entry0  = entropy_look_up(bank, high);
    const uint32_t window1 = funnel_left(0, high, entry0);
    const uint32_t entry1  = entropy_look_up(bank, window1);
    const uint32_t two     = entry0 + entry1;
    const uint32_t window2 = funnel_left(low, high, two);
    const uint32_t entry2  = entropy_look_up(bank, window2);
    const uint32_t window3 = funnel_left(0, window2, entry2);
    const uint32_t entry3  = entropy_look_up(bank, window3);
    position += two;
    position += entry2 + entry3;

    const uint32_t ab = byte_perm(entropy_value(high,    entry0), entropy_value(window1, entry1), 0x0062);
    const uint32_t cd = byte_perm(entropy_value(window2, entry2), entropy_value(window3, entry3), 0x0062);
    return byte_perm(ab, cd, 0x5410);
}

template <ggml_type TYPE, typename Words>
ENTROPY_DEVICE void entropy_unit(const Words & words, uint32_t bank, uint32_t & position, uint32_t (&symbols)[entropy_traits<TYPE>::unit_words]) {
    ENTROPY_UNROLL
    for (int i = 0; i < entropy_traits<TYPE>::unit_words; i++) {
        symbols[i] = entropy_four(words, bank, position);
    }
}

// Decode one tile, whose ring is at its start, and give it to the sink: begin(first column, number of units), then take(symbols) for each
// unit, by all lanes together.
template <ggml_type TYPE, typename Sink>
ENTROPY_DEVICE void entropy_decode_tile(const entropy_slab & slab, int group, int slice, entropy_ring & ring, Sink & sink) {
    using traits = entropy_traits<TYPE>;
    const int n_lanes = slab.n_lanes(group);
    const int n_units = slab.slice_cols(slice)/32;
    const uint32_t bank = keep(lane_id()*4);

    sink.begin(slice*slab.tile_cols, n_units);
    uint32_t position = 0;
    uint32_t symbols[traits::unit_words];
    int unit = 0;
    ENTROPY_NOUNROLL
    for (; unit < n_units; unit++) {
        // once for 32 symbols: that is every other unit of EQ4
        if (unit % (32/traits::unit_symbols) == 0 && !ring.advance(position)) {
            break;
        }
        entropy_unit<TYPE>(ring, bank, position, symbols);
        sink.take(symbols);
    }
    if (unit == n_units) {
        return;
    }
    const entropy_direct direct(ring, n_lanes);
    ENTROPY_NOUNROLL
    for (; unit < n_units; unit++) {
        entropy_unit<TYPE>(direct, bank, position, symbols);
        sink.take(symbols);
    }
}

// The ring of a tile in memory that another tile's may have had.
ENTROPY_DEVICE entropy_ring entropy_next_ring(const entropy_slab & slab, int group, int slice, uint32_t ring_base) {
    async_wait<0>(); // a damaged tile may leave copies under way
    warp_sync();     // the ring of the tile before is not needed any more
    return entropy_ring(entropy_tile(slab, group, slice), ring_base, slab.n_lanes(group));
}
