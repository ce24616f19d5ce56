// SPDX-License-Identifier: MIT
//
// The device layout of entropy-coded tensors (docs/format.md 8): what GPU kernels read. It never stands in a file: the host makes it from
// the plane layout (ggml-entropy.h) while it uploads a tensor.
//
// A slab is cut into tiles of 32 rows x tile_cols columns. Each row of a tile is a lane with a bitstream of its own, and word j of all
// lanes stands together. One 256-entry table decodes: entry -> (t, bias), symbol = (top t bits) + bias mod 256. EQ4 symbols are pairs of
// codes.
//
// The order of work: ggml_entropy_lanes_count over all codes, _plan, _measure, _size, then _begin and _encode_groups. Row groups here have
// 32 rows; callers parallelise over ranges of them. The conventions of ggml-entropy.h hold.

#pragma once

#include "ggml-entropy.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_ENTROPY_LANES               32   // rows of a tile
#define GGML_ENTROPY_LANES_ALIGN         256  // of sections
#define GGML_ENTROPY_LANES_MAX_TILE_COLS 1024
#define GGML_ENTROPY_LANES_MAX_WORDS     255  // of a lane

// The first 256 bytes of a slab in the device layout (8.1).
struct ggml_entropy_lanes_header {
    uint8_t  magic[4];
    uint16_t version;
    uint8_t  kind;
    uint8_t  reserved0;
    uint64_t reserved1;
    uint64_t slab_size;
    uint32_t n_cols;
    uint32_t n_rows;
    uint32_t n_slabs;
    uint32_t tile_cols;
    uint32_t n_tiles;
    uint8_t  scale_mode;
    uint8_t  offset_mode;
    uint16_t scale;              // f16 bits
    float    offset;
    uint32_t reserved2;
    uint64_t table_at;
    uint64_t scales_at;
    uint64_t offsets_at;
    uint64_t word_offsets_at;
    uint64_t lane_words_at;
    uint64_t bitstream_at;
    uint64_t bitstream_words;
    uint8_t  reserved3[144];
};

// One entry of the decode table (8.2).
struct ggml_entropy_entry {
    uint8_t t;
    uint8_t bias;
};

// Is this a slab in the device layout? Looks at the magic alone.
GGML_API bool ggml_entropy_is_lanes(const void * slab);

// tile_cols by default for a matrix of this shape: rows of up to 1024 columns whole below 4M weights; else 512, or 256 where 512 gives
// fewer than 2048 tiles. ggml_entropy_lanes_measure tells if a lane gets too long: then take half of it.
GGML_API int64_t ggml_entropy_lanes_default_tile_cols(int64_t n_rows, int64_t n_cols);

// Counts of the symbols of the row groups [group0, group1), added to counts. Codes of EQ4 are taken modulo 16 here and below: damaged data
// may hold any.
GGML_API enum ggml_entropy_status ggml_entropy_lanes_count(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, int64_t group0, int64_t group1, uint64_t counts[256]);

// A code for given symbol counts: the decode table and, per symbol, the bits and their number. Symbols that cannot be coded have length 0.
struct ggml_entropy_lanes_plan {
    struct ggml_entropy_entry table[256];
    uint16_t code  [256];
    uint8_t  length[256];
    uint64_t n_bits;                     // coded size of the counted symbols
};

// The optimal class partition with prefix length <= 8 and t <= 15 (8.2), by an exact dynamic programme.
GGML_API enum ggml_entropy_status ggml_entropy_lanes_plan_code(const uint64_t counts[256], struct ggml_entropy_lanes_plan * plan);

// Lane lengths in words of the tiles of the row groups [group0, group1), written to lane_words[tile][32] of the whole slab.
// *max_words is raised to the longest lane, which may exceed 255 (lengths above are then not representable: take a smaller tile_cols).
GGML_API enum ggml_entropy_status ggml_entropy_lanes_measure(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, const struct ggml_entropy_lanes_plan * plan, int64_t tile_cols,
        int64_t group0, int64_t group1, uint8_t * lane_words, int64_t * max_words);

// Bytes of a slab with these lane lengths, slack included; 0 if the shape or the lengths are not representable. Of spec only type, shape,
// tile_cols, n_scales and n_offsets count.
GGML_API size_t ggml_entropy_lanes_size(const struct ggml_entropy_spec * spec, const uint8_t * lane_words);

// Write all sections but the bitstream into slab, whose slab_size bytes the caller has zeroed; at least ggml_entropy_lanes_size.
GGML_API enum ggml_entropy_status ggml_entropy_lanes_begin(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_lanes_plan * plan, const uint8_t * lane_words, void * slab,
        size_t slab_size);

// Write the bitstream of the row groups [group0, group1). Ranges that do not overlap may be written concurrently.
GGML_API enum ggml_entropy_status ggml_entropy_lanes_encode_groups(
        const struct ggml_entropy_lanes_plan * plan, const int8_t * q, int64_t group0, int64_t group1, void * slab);

// Codes of one row of a slab that the functions above made, [n_cols]: plainly, one code at a time. For tensors that the scheduler copies
// from a GPU to the CPU, and for tests.
GGML_API void ggml_entropy_lanes_decode_row(const void * slab, int64_t row, int8_t * q);

// Scale and offset of one row; the offset is 0 if the slab has none.
GGML_API void ggml_entropy_lanes_row_grid(const void * slab, int64_t row, float * scale, float * offset);

#ifdef __cplusplus
}
#endif
