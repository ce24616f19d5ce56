// SPDX-License-Identifier: MIT
//
// A slab in device memory, in the device layout (docs/format.md 8), which the host made of a validated slab of the file. Shape and modes
// are read from its header by the kernels themselves, because the host knows only type, ne and nb: an op must not wait for the device.

#pragma once

#include "entropy-device.cuh"
#include "../../ggml-entropy-lanes.h"

#define ENTROPY_LANES GGML_ENTROPY_LANES

// Columns that share a symbol, symbols of a unit (32 columns, one block of activations), and four-symbol words of a unit.
template <ggml_type TYPE> struct entropy_traits;

template <> struct entropy_traits<GGML_TYPE_EQ8> {
    static constexpr int     cols_per_symbol = 1;
    static constexpr int     unit_symbols    = 32;
    static constexpr int     unit_words      = 8;
    static constexpr int32_t zero            = 128; // the symbol, or nibble, of code 0
};

template <> struct entropy_traits<GGML_TYPE_EQ4> {
    static constexpr int     cols_per_symbol = 2;
    static constexpr int     unit_symbols    = 16;
    static constexpr int     unit_words      = 4;
    static constexpr int32_t zero            = 8;
};

struct entropy_slab {
    const uint8_t * base;
    int      n_cols;
    int      n_rows;
    int      tile_cols;
    int      n_slices;
    uint8_t  scale_mode;
    uint8_t  offset_mode;

    ENTROPY_MEMBER explicit entropy_slab(const uint8_t * base) : base(base) {
        const ggml_entropy_lanes_header * h = header();
        n_cols      = (int) global_load(&h->n_cols);
        n_rows      = (int) global_load(&h->n_rows);
        tile_cols   = (int) global_load(&h->tile_cols);
        n_slices    = (n_cols + tile_cols - 1) / tile_cols;
        scale_mode  = global_load(&h->scale_mode);
        offset_mode = global_load(&h->offset_mode);
    }

    ENTROPY_MEMBER const ggml_entropy_lanes_header * header() const {
        return (const ggml_entropy_lanes_header *) base;
    }

    template <typename T>
    ENTROPY_MEMBER const T * section(const uint64_t & at) const {
        return (const T *) (base + global_load((const unsigned long long *) &at));
    }

    ENTROPY_MEMBER int n_groups() const {
        return (n_rows + ENTROPY_LANES - 1) / ENTROPY_LANES;
    }

    ENTROPY_MEMBER int n_lanes(int group) const {
        const int n = n_rows - group*ENTROPY_LANES;
        return n < ENTROPY_LANES ? n : ENTROPY_LANES;
    }

    ENTROPY_MEMBER int slice_cols(int slice) const {
        const int n = n_cols - slice*tile_cols;
        return n < tile_cols ? n : tile_cols;
    }

    // f16 bits
    ENTROPY_MEMBER uint16_t scale(int row) const {
        return scale_mode == GGML_ENTROPY_SCALE_ROW ? global_load(section<uint16_t>(header()->scales_at) + row) : global_load(&header()->scale);
    }

    ENTROPY_MEMBER float offset(int row) const {
        if (offset_mode == GGML_ENTROPY_OFFSET_ROW) {
            return global_load(section<float>(header()->offsets_at) + row);
        }
        return offset_mode == GGML_ENTROPY_OFFSET_ONE ? global_load(&header()->offset) : 0.0f;
    }
};

// One tile: its words and the lengths of its lanes.
struct entropy_tile {
    const uint32_t * words;
    uint32_t         length;   // of this thread's lane, in words; 0 if the row does not exist

    ENTROPY_MEMBER entropy_tile(const entropy_slab & slab, int group, int slice) {
        const ggml_entropy_lanes_header * h = slab.header();
        const int64_t i = (int64_t) group*slab.n_slices + slice;
        words  = slab.section<uint32_t>(h->bitstream_at) + global_load(slab.section<uint32_t>(h->word_offsets_at) + i);
        length = global_load(slab.section<uint8_t>(h->lane_words_at) + i*ENTROPY_LANES + lane_id());
    }
};
