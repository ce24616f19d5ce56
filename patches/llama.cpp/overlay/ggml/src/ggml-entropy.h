// SPDX-License-Identifier: MIT
//
// Codec of the entropy-coded tensor types EQ8 and EQ4: plan, encode, decode, validate, verify.
// The bit layout is specified in docs/format.md of EntroLLM-GGUF; nothing outside these files and the kernels knows it.
//
// In one paragraph: a slab is one matrix. Its rows are cut into groups of 32, its columns into slices of tile_cols; a tile is one
// group x one slice. Each row of a tile is a lane with a bitstream of its own, and word j of all lanes stands together ("word row" j,
// only the lanes that still have a word j). One 256-entry table decodes: entry -> (t, bias), symbol = (top t bits) + bias mod 256.
//
// Conventions
// - Nothing here prints, exits, starts threads or keeps state. Work on row groups is independent: callers parallelise over ranges.
// - Codes are int8, row-major, shape (n_rows, n_cols): EQ8 -128..127, EQ4 -8..7.
// - Functions return a status; memory is the caller's. A view borrows the slab's memory.
// - Decoding a *validated* slab is memory-safe for any bitstream; decoding an unvalidated one is not allowed.
//
// Where to start: ggml_entropy_validate, then ggml_entropy_decoder_lanes, in ggml-entropy.c. Writing is in ggml-entropy-encode.c.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_ENTROPY_LANES          32   // rows of a tile
#define GGML_ENTROPY_ALIGN          256  // of sections and slabs
#define GGML_ENTROPY_SLACK          256  // zero bytes behind the bitstream, free to over-read
#define GGML_ENTROPY_MAX_TILE_COLS  1024
#define GGML_ENTROPY_MAX_LANE_WORDS 255
#define GGML_ENTROPY_HEADER_SIZE    256

enum ggml_entropy_kind {
    GGML_ENTROPY_KIND_EQ8 = 1,
    GGML_ENTROPY_KIND_EQ4 = 2,
};

enum ggml_entropy_scale_mode  { GGML_ENTROPY_SCALE_ONE   = 0, GGML_ENTROPY_SCALE_ROW  = 1 };
enum ggml_entropy_offset_mode { GGML_ENTROPY_OFFSET_NONE = 0, GGML_ENTROPY_OFFSET_ONE = 1, GGML_ENTROPY_OFFSET_ROW = 2 };

// What is wrong with an argument or a slab. ggml_entropy_status_str gives one clause in English.
enum ggml_entropy_status {
    GGML_ENTROPY_OK = 0,
    GGML_ENTROPY_BAD_ARGUMENT,   // the caller's: shape, kind, range of rows, missing pointer
    GGML_ENTROPY_BAD_CODE,       // a code outside the range of the kind
    GGML_ENTROPY_NO_MEMORY,
    GGML_ENTROPY_TRUNCATED,      // fewer bytes than the header needs or promises
    GGML_ENTROPY_BAD_MAGIC,
    GGML_ENTROPY_BAD_VERSION,
    GGML_ENTROPY_BAD_KIND,
    GGML_ENTROPY_BAD_SHAPE,      // of the slab against itself or against the GGUF
    GGML_ENTROPY_BAD_MODE,       // scale_mode, offset_mode, or slabs of one tensor that differ in them
    GGML_ENTROPY_BAD_LAYOUT,     // section offsets, slab size, bitstream length
    GGML_ENTROPY_BAD_RESERVED,   // a byte that must be zero is not
    GGML_ENTROPY_BAD_SCALE,      // a scale or an offset is not finite, or an EQ4 minimum is no f16
    GGML_ENTROPY_BAD_TABLE,
    GGML_ENTROPY_BAD_INDEX,      // word offsets or lane lengths
    GGML_ENTROPY_BAD_HASH,       // verify only
    GGML_ENTROPY_BAD_STREAM,     // verify only: a lane does not hold exactly its codes
    GGML_ENTROPY_STATUS_COUNT,
};

// The first 256 bytes of a slab (docs/format.md 5.1). Little-endian hosts only.
struct ggml_entropy_header {
    uint8_t  magic[4];
    uint16_t version;
    uint8_t  kind;
    uint8_t  reserved0;
    uint64_t hash;
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
    uint32_t reserved1;
    uint64_t table_at;
    uint64_t scales_at;
    uint64_t offsets_at;
    uint64_t word_offsets_at;
    uint64_t lane_words_at;
    uint64_t bitstream_at;
    uint64_t bitstream_words;
    uint8_t  reserved2[144];
};

// One entry of the decode table (5.2).
struct ggml_entropy_entry {
    uint8_t t;
    uint8_t bias;
};

// Pointers into a slab whose header was checked. Borrowed: valid as long as the slab's memory is.
struct ggml_entropy_view {
    const struct ggml_entropy_header * header;
    const struct ggml_entropy_entry  * table;        // [256]
    const uint16_t                   * scales;       // f16 bits, [n_rows] or NULL (one scale, in the header)
    const float                      * offsets;      // [n_rows] or NULL (none, or one in the header)
    const uint32_t                   * word_offsets; // [n_tiles]
    const uint8_t                    * lane_words;   // [n_tiles][32]
    const uint32_t                   * bitstream;    // [bitstream_words], and GGML_ENTROPY_SLACK bytes
    int64_t n_groups;                                // ceil(n_rows / 32)
    int64_t n_slices;                                // ceil(n_cols / tile_cols)
};

// ---- types -----------------------------------------------------------------------------------------------------------------------

GGML_API bool ggml_entropy_is_type(enum ggml_type type);
GGML_API const char * ggml_entropy_status_str(enum ggml_entropy_status status);

// ---- reading ---------------------------------------------------------------------------------------------------------------------

// Check the 256 bytes of a header alone: enough to trust slab_size, n_slabs, shape and modes, not the sections behind it.
// type is the GGUF's. Use it to learn the size of a tensor from a file: slab_size * n_slabs bytes.
GGML_API enum ggml_entropy_status ggml_entropy_check_header(
        enum ggml_type type, const int64_t ne[4], const void * header, struct ggml_entropy_header * out);

// The stock type a tensor with this header decodes to (6.1).
GGML_API enum ggml_type ggml_entropy_plain_type(const struct ggml_entropy_header * header);

// Header and pointers of one slab of n_bytes bytes. Checks what ggml_entropy_check_header checks, less the GGUF's shape.
// slab must be 8-byte aligned (BAD_ARGUMENT otherwise).
GGML_API enum ggml_entropy_status ggml_entropy_open(const void * slab, size_t n_bytes, struct ggml_entropy_view * view);

// Everything a kernel relies on, for all slabs of a tensor (9). Reads no bitstream. data must be 8-byte aligned.
GGML_API enum ggml_entropy_status ggml_entropy_validate(enum ggml_type type, const int64_t ne[4], const void * data, size_t n_bytes);

// The same without the GGUF's shape, for ggml_validate_row_data; data holds whole slabs.
GGML_API enum ggml_entropy_status ggml_entropy_validate_slabs(enum ggml_type type, const void * data, size_t n_bytes);

// The same for one slab of at most n_bytes bytes; fills view.
GGML_API enum ggml_entropy_status ggml_entropy_validate_slab(const void * slab, size_t n_bytes, struct ggml_entropy_view * view);

// Hash of one validated slab.
GGML_API enum ggml_entropy_status ggml_entropy_verify_hash(const struct ggml_entropy_view * view);

// Every lane of the row groups [group0, group1) decodes to exactly its codes, uses all of its words and pads with zero bits; padding
// words behind the tiles are zero. The slab must be validated.
GGML_API enum ggml_entropy_status ggml_entropy_verify_groups(const struct ggml_entropy_view * view, int64_t group0, int64_t group1);

// Unused bytes of the slab (between sections, slack) are zero. The slab must be validated.
GGML_API enum ggml_entropy_status ggml_entropy_verify_padding(const struct ggml_entropy_view * view);

// Decode the row groups [group0, group1) of a validated slab. q points at the code of row 32 * group0, column 0; rows are n_cols apart.
GGML_API enum ggml_entropy_status ggml_entropy_decode_groups(
        const struct ggml_entropy_view * view, int64_t group0, int64_t group1, int8_t * q);

// The same, into rows of the stock type ggml_entropy_plain_type names. dst points at row 32 * group0.
GGML_API enum ggml_entropy_status ggml_entropy_decode_groups_plain(
        const struct ggml_entropy_view * view, int64_t group0, int64_t group1, void * dst);

#define GGML_ENTROPY_RUN_BITS 11

// What one thread needs to decode tiles of one slab; owned by the caller, 82 KB. Symbols are what it leaves behind.
struct ggml_entropy_decoder {
    uint32_t words  [GGML_ENTROPY_LANES][GGML_ENTROPY_MAX_LANE_WORDS + 2]; // of a tile, as the decoding function wants them
    uint8_t  symbols[GGML_ENTROPY_LANES][GGML_ENTROPY_MAX_TILE_COLS];      // EQ8: one a column; EQ4: one for two columns
    uint64_t runs   [1 << GGML_ENTROPY_RUN_BITS];                          // several symbols per look-up, see ggml-entropy.c
    bool     has_runs;                                                     // made when first needed
    struct ggml_entropy_view view;
};

// Prepare for a validated slab.
GGML_API void ggml_entropy_decoder_open(struct ggml_entropy_decoder * decoder, const struct ggml_entropy_view * view);

// Symbols of the lanes [lane0, lane1) of one tile into decoder->symbols. The lanes exist: lane1 <= rows of the group.
GGML_API void ggml_entropy_decoder_lanes(struct ggml_entropy_decoder * decoder, int64_t group, int64_t slice, int lane0, int lane1);

// The symbols of these lanes into the columns of their slice of rows of type F32 or the plain type; or of Q8_0 (EQ8) and Q4_0 (EQ4)
// whatever the offsets, which are then left out. dst points at column 0 of lane0's row; rows are row_size bytes apart.
GGML_API void ggml_entropy_decoder_rows(
        const struct ggml_entropy_decoder * decoder, int64_t group, int64_t slice, int lane0, int lane1,
        enum ggml_type type, void * dst, size_t row_size);

// Offset of a row; 0 if the slab has none.
GGML_API float ggml_entropy_row_offset(const struct ggml_entropy_view * view, int64_t row);

// ---- writing ---------------------------------------------------------------------------------------------------------------------

// Counts of the 256 symbols of the row groups [group0, group1), added to counts. BAD_CODE if a code is out of range.
GGML_API enum ggml_entropy_status ggml_entropy_count(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, int64_t group0, int64_t group1, uint64_t counts[256]);

// A code for given symbol counts: the decode table and, per symbol, the bits and their number. Symbols that cannot be coded have length 0.
struct ggml_entropy_plan {
    struct ggml_entropy_entry table[256];
    uint16_t code  [256];
    uint8_t  length[256];
    uint64_t n_bits;                     // coded size of the counted symbols
};

// The optimal class partition with prefix length <= 8 and t <= 15 (docs/format.md 7), by an exact dynamic programme.
GGML_API enum ggml_entropy_status ggml_entropy_plan_code(const uint64_t counts[256], struct ggml_entropy_plan * plan);

// tile_cols by default (7) for a matrix of this shape.
GGML_API int64_t ggml_entropy_default_tile_cols(int64_t n_rows, int64_t n_cols);

// Lane lengths in words of the tiles of the row groups [group0, group1), written to lane_words[tile][32] of the whole slab.
// *max_words is raised to the longest lane, which may exceed 255 (lengths above are then not representable: take a smaller tile_cols).
GGML_API enum ggml_entropy_status ggml_entropy_measure(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, const struct ggml_entropy_plan * plan, int64_t tile_cols,
        int64_t group0, int64_t group1, uint8_t * lane_words, int64_t * max_words);

struct ggml_entropy_spec {
    enum ggml_type   type;
    int64_t          n_cols;
    int64_t          n_rows;
    int64_t          n_slabs;            // of the tensor this slab belongs to
    int64_t          tile_cols;
    const uint16_t * scales;             // f16 bits
    int64_t          n_scales;           // 1 or n_rows
    const float    * offsets;            // may be NULL
    int64_t          n_offsets;          // 0, 1 or n_rows
};

// Bytes of a slab with these lane lengths, slack included; 0 if the shape or the lengths are not representable.
GGML_API size_t ggml_entropy_slab_size(const struct ggml_entropy_spec * spec, const uint8_t * lane_words);

// Write all sections but the bitstream into slab, whose slab_size bytes the caller has zeroed (slab_size may exceed ggml_entropy_slab_size by a
// multiple of 256: slabs of one tensor are equally long).
GGML_API enum ggml_entropy_status ggml_entropy_begin(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_plan * plan, const uint8_t * lane_words, void * slab, size_t slab_size);

// Write the bitstream of the row groups [group0, group1). Ranges that do not overlap may be written concurrently.
GGML_API enum ggml_entropy_status ggml_entropy_encode_groups(
        const struct ggml_entropy_plan * plan, const int8_t * q, int64_t group0, int64_t group1, void * slab);

// Write the hash. Last step.
GGML_API enum ggml_entropy_status ggml_entropy_finish(void * slab);

#ifdef __cplusplus
}
#endif
