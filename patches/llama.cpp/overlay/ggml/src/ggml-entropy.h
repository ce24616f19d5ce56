// SPDX-License-Identifier: MIT
//
// Codec of the entropy-coded tensor types EQ8, EQ4 and EBF16: plan, encode, decode, validate, verify.
// The bit layout is specified in docs/format.md of EntroLLM-GGUF; nothing outside these files and the kernels knows it.
//
// In one paragraph: a slab is one matrix. Its rows are cut into groups of 16, and a group into units of 16 rows x 4 columns, 64 weights.
// A weight's code starts with B raw bits, which stand together for a whole unit; most weights need no more. The others go on in the
// group's tail, bit plane by bit plane over the weights that are still open, so that one pdep decodes one bit of up to 64 weights.
// What the tail leaves open stands as a byte at the group's end.
//
// Conventions
// - Nothing here prints, exits, starts threads or keeps state. Work on row groups is independent: callers parallelise over ranges.
// - Codes are int8, row-major, shape (n_rows, n_cols): EQ8 and EBF16 -128..127, EQ4 -8..7.
// - Functions return a status; memory is the caller's. A view holds a copy of the header and borrows the rest of the slab.
// - Decoding a *validated* slab is memory-safe for any bits behind its header, also if they change while they are read; decoding an
//   unvalidated one is not allowed.
//
// Where to start: ggml_entropy_validate, then ggml_entropy_decode_units, in ggml-entropy.c. Writing is in ggml-entropy-encode.c. The
// layout that GPUs read, made from this one while a model is loaded, is in ggml-entropy-lanes.h.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_ENTROPY_VERSION      2    // of the format
#define GGML_ENTROPY_GROUP_ROWS   16   // rows of a row group
#define GGML_ENTROPY_UNIT_COLS    4    // columns of a unit
#define GGML_ENTROPY_UNIT         64   // weights of a unit; weight i is row i / 4, column i % 4
#define GGML_ENTROPY_MAX_UNITS    64   // that are decoded in one call: 256 columns
#define GGML_ENTROPY_CLAMP_UNITS  4    // units between two looks at the end of a tail
#define GGML_ENTROPY_N_TAILS      3    // tail shapes there are
#define GGML_ENTROPY_MAX_CLASSES  8
#define GGML_ENTROPY_MAX_PLANES   6    // bit planes of a unit's tail
#define GGML_ENTROPY_ALIGN        256  // of slabs
#define GGML_ENTROPY_SLACK        256  // zero bytes behind the body, free to over-read
#define GGML_ENTROPY_HEADER_SIZE  256

enum ggml_entropy_kind {
    GGML_ENTROPY_KIND_EQ8 = 1,
    GGML_ENTROPY_KIND_EQ4 = 2,
    GGML_ENTROPY_KIND_EBF16 = 3, // bf16, bit by bit: a code is an exponent less 128, and the other 8 bits stand beside (docs/format.md 5.8)
};

enum ggml_entropy_scale_mode  { GGML_ENTROPY_SCALE_ONE   = 0, GGML_ENTROPY_SCALE_ROW  = 1 };
enum ggml_entropy_offset_mode { GGML_ENTROPY_OFFSET_NONE = 0, GGML_ENTROPY_OFFSET_ONE = 1, GGML_ENTROPY_OFFSET_ROW = 2 };

// What is wrong with an argument or a slab. ggml_entropy_status_str gives one clause in English.
enum ggml_entropy_status {
    GGML_ENTROPY_OK = 0,
    GGML_ENTROPY_BAD_ARGUMENT,   // the caller's: shape, kind, range of rows, alignment, impossible code parameters
    GGML_ENTROPY_BAD_CODE,       // a code outside the range of the kind
    GGML_ENTROPY_NO_MEMORY,
    GGML_ENTROPY_TRUNCATED,      // fewer bytes than the header needs or promises
    GGML_ENTROPY_BAD_MAGIC,
    GGML_ENTROPY_OLD_VERSION,    // format version 1
    GGML_ENTROPY_BAD_VERSION,    // another one that is not known
    GGML_ENTROPY_BAD_KIND,
    GGML_ENTROPY_BAD_SHAPE,      // of the slab against itself or against the GGUF
    GGML_ENTROPY_BAD_MODE,       // scale_mode, offset_mode, or slabs of one tensor that differ in them
    GGML_ENTROPY_BAD_LAYOUT,     // section offsets, sizes
    GGML_ENTROPY_BAD_RESERVED,   // a byte that must be zero is not
    GGML_ENTROPY_BAD_SCALE,      // a scale or an offset is not finite, or an EQ4 minimum is no f16
    GGML_ENTROPY_BAD_TABLE,      // the parameters of the code
    GGML_ENTROPY_BAD_INDEX,      // where row groups stand
    GGML_ENTROPY_BAD_HASH,       // verify only
    GGML_ENTROPY_BAD_STREAM,     // verify only: a row group does not hold exactly its codes
    GGML_ENTROPY_STATUS_COUNT,
};

// A code (docs/format.md 5.2).
struct ggml_entropy_code {
    uint8_t raw_bits;                                 // B, 1..8
    uint8_t bin_bits;                                 // k, below B; 0 if B = 8
    uint8_t tail;                                     // number of a tail shape; 0 if and only if B = 8
    int8_t  base;                                     // of the direct interval
    int8_t  class_base[GGML_ENTROPY_MAX_CLASSES];     // first code of each class's bin; unused ones 0
    uint8_t reserved[4];
};

// The digits of a tail shape: widths of 1 or 2 bits, in the order in which they are read.
struct ggml_entropy_tail {
    int n_digits;
    int width[4];
    int n_classes;
    int n_planes;
};

// NULL if there is no shape of that number.
GGML_API const struct ggml_entropy_tail * ggml_entropy_tail_of(int number);

// The first 256 bytes of a slab (docs/format.md 5.1). Little-endian hosts only.
struct ggml_entropy_header {
    uint8_t  magic[4];
    uint16_t version; // GGML_ENTROPY_VERSION
    uint8_t  kind;
    uint8_t  reserved0;
    uint64_t hash;
    uint64_t slab_size;
    uint32_t n_cols;
    uint32_t n_rows;
    uint32_t n_slabs;
    uint8_t  scale_mode;
    uint8_t  offset_mode;
    uint16_t scale;              // f16 bits
    float    offset;
    uint32_t tile_cols;          // of the device layout
    uint64_t device_size;        // bytes of a slab in the device layout
    uint64_t scales_at;
    uint64_t offsets_at;
    uint64_t index_at;
    uint64_t body_at;
    uint64_t body_size;
    struct ggml_entropy_code code;
    uint64_t rests_at;           // EBF16 only
    uint8_t  reserved1[136];
};

struct ggml_entropy_stream;

// A decoder of units: see ggml_entropy_decode_units. out is aligned to 64 bytes.
typedef void (* ggml_entropy_decode_t)(const struct ggml_entropy_code * code, struct ggml_entropy_stream * stream, int n_units, int8_t * out);

// A slab whose header was checked: a copy of the header, and pointers that are valid as long as the slab's memory is.
struct ggml_entropy_view {
    struct ggml_entropy_header header;
    const uint16_t * scales;     // f16 bits, [n_rows] or NULL (one scale, in the header)
    const float    * offsets;    // [n_rows] or NULL (none, or one in the header)
    const uint32_t * begin;      // [n_groups]: where row groups start in the body, in units of 8 bytes (5.5)
    const uint8_t  * rests;      // [n_rows][n_cols], sign and mantissa of each weight; NULL unless EBF16
    const uint8_t  * body;       // [body_size], and GGML_ENTROPY_SLACK bytes
    int64_t          n_groups;   // ceil(n_rows / 16)
    int64_t          n_units;    // of a row group: n_cols / 4
    ggml_entropy_decode_t decode; // what the functions that give codes or rows use: the portable decoder, until a caller puts a faster one here
};

// ---- types -----------------------------------------------------------------------------------------------------------------------

GGML_API bool ggml_entropy_is_type(enum ggml_type type);

// Those that are integers with a scale: what kernels compute on, and what has a device layout. EBF16 is decoded at load.
GGML_API bool ggml_entropy_is_quantized(enum ggml_type type);
GGML_API const char * ggml_entropy_status_str(enum ggml_entropy_status status);

// Bytes of a structure of this file or of ggml-entropy-lanes.h, by its name without "ggml_entropy_"; 0 if there is none such. A binding
// that mirrors the structures learns from it whether it is of the library's version.
GGML_API size_t ggml_entropy_size_of(const char * structure);

// Whether a tensor may have this shape (4).
GGML_API bool ggml_entropy_shape_is_valid(int64_t n_cols, int64_t n_rows, int64_t n_slabs);

// ---- reading ---------------------------------------------------------------------------------------------------------------------

// Check the 256 bytes of a header alone: enough to trust sizes, shape, modes and the code, not the sections behind it.
// type is the GGUF's. Use it to learn the size of a tensor from a file: slab_size * n_slabs bytes.
GGML_API enum ggml_entropy_status ggml_entropy_check_header(
        enum ggml_type type, const int64_t ne[4], const void * header, struct ggml_entropy_header * out);

// The stock type a tensor with this header decodes to (6.1).
GGML_API enum ggml_type ggml_entropy_plain_type(const struct ggml_entropy_header * header);

// Are the weights of all codes of the kind finite as f16, in every row of a validated slab? Nothing may decode it to F16 otherwise (6.1).
GGML_API bool ggml_entropy_fits_f16(const struct ggml_entropy_view * view);

// Header and pointers of one slab of n_bytes bytes. Checks what ggml_entropy_check_header checks, less the GGUF's shape.
// slab must be 8-byte aligned (BAD_ARGUMENT otherwise).
GGML_API enum ggml_entropy_status ggml_entropy_open(const void * slab, size_t n_bytes, struct ggml_entropy_view * view);

// Everything a kernel relies on, for all slabs of a tensor (9). Reads no codes. data must be 8-byte aligned.
GGML_API enum ggml_entropy_status ggml_entropy_validate(enum ggml_type type, const int64_t ne[4], const void * data, size_t n_bytes);

// The same without the GGUF's shape, for ggml_validate_row_data; data holds whole slabs.
GGML_API enum ggml_entropy_status ggml_entropy_validate_slabs(enum ggml_type type, const void * data, size_t n_bytes);

// The same for one slab of at most n_bytes bytes; fills view.
GGML_API enum ggml_entropy_status ggml_entropy_validate_slab(const void * slab, size_t n_bytes, struct ggml_entropy_view * view);

// Seed of the hash of a tensor's slab i (5.1): the hash also holds the tensor's name and the slab's number.
GGML_API uint64_t ggml_entropy_seed(const char * name, int64_t i_slab);

// Hash of one validated slab.
GGML_API enum ggml_entropy_status ggml_entropy_verify_hash(const struct ggml_entropy_view * view, const void * slab, uint64_t seed);

// The row groups [group0, group1) hold exactly their codes: tail and far stream fill what the index says, and bits that no code uses
// are zero. The slab must be validated.
GGML_API enum ggml_entropy_status ggml_entropy_verify_groups(const struct ggml_entropy_view * view, int64_t group0, int64_t group1);

// Unused bytes of the slab (between sections, slack) are zero. The slab must be validated.
GGML_API enum ggml_entropy_status ggml_entropy_verify_padding(const struct ggml_entropy_view * view, const void * slab);

// Decode the row groups [group0, group1) of a validated slab. q points at the code of row 16 * group0, column 0; rows are n_cols apart.
GGML_API enum ggml_entropy_status ggml_entropy_decode_groups(
        const struct ggml_entropy_view * view, int64_t group0, int64_t group1, int8_t * q);

// The same, into rows of the stock type ggml_entropy_plain_type names, or of type F32. dst points at row 16 * group0; rows are row_size
// bytes apart.
GGML_API enum ggml_entropy_status ggml_entropy_decode_groups_plain(
        const struct ggml_entropy_view * view, int64_t group0, int64_t group1, enum ggml_type type, void * dst);

// Where decoding of a row group has come to. All pointers lie in the slab, whatever the index says.
struct ggml_entropy_stream {
    const uint8_t * raw;         // of the next unit
    const uint8_t * tail;        // start of the group's tail
    const uint8_t * far;         // behind the next byte of the far stream, which is read backwards; never before tail
    uint64_t        pos;         // in the tail, in bits
    uint64_t        end;         // of the group, in bits from the start of the tail
    int64_t         unit;        // number of the next unit
    int64_t         n_units;     // of the group
    int64_t         n_far;       // far weights so far; the portable decoder counts them, for verification
};

GGML_API void ggml_entropy_stream_open(const struct ggml_entropy_view * view, int64_t group, struct ggml_entropy_stream * stream);

// Codes of the next n_units units, a multiple of 4 up to GGML_ENTROPY_MAX_UNITS, of which the group has as many: out[unit][64].
// This is the portable decoder; ggml-cpu has others with the same result for any bits.
GGML_API void ggml_entropy_decode_units(
        const struct ggml_entropy_code * code, struct ggml_entropy_stream * stream, int n_units, int8_t * out);

// Scale (f16 bits) and offset of a row; the offset is 0 if the slab has none.
GGML_API uint16_t ggml_entropy_row_scale (const struct ggml_entropy_view * view, int64_t row);
GGML_API float    ggml_entropy_row_offset(const struct ggml_entropy_view * view, int64_t row);

// ---- writing ---------------------------------------------------------------------------------------------------------------------

// Counts of the 256 codes (q + 128) of the row groups [group0, group1), added to counts. BAD_CODE if a code is out of range.
GGML_API enum ggml_entropy_status ggml_entropy_count(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, int64_t group0, int64_t group1, uint64_t counts[256]);

// A code for given counts, and what it costs.
struct ggml_entropy_plan {
    struct ggml_entropy_code code;
    uint8_t  length[256];        // bits of each code q + 128, raw, tail and far together
    uint64_t n_bits;             // of the counted codes
    uint64_t n_tail;             // of them, those that have a tail
    uint64_t n_far;              // and those of the far stream
};

// What a decoder's time is worth in bits: size against speed (docs/decisions.md).
#define GGML_ENTROPY_PLANE_COST 0.005 // of a weight, for each plane of the code's tail
#define GGML_ENTROPY_TAIL_COST  0.05  // of a bit of a tail, beyond that bit
#define GGML_ENTROPY_FAR_COST   4.0   // of a far weight, beyond its byte

// The best code (7), by trying all: the one of the least n_bits and these costs.
GGML_API enum ggml_entropy_status ggml_entropy_plan_code(const uint64_t counts[256], struct ggml_entropy_plan * plan);

// Size of the streams of one row group.
struct ggml_entropy_extent {
    uint32_t tail;               // bytes
    uint32_t far;                // bytes
};

// Extents of the row groups [group0, group1), written to extents[group] of the whole slab.
GGML_API enum ggml_entropy_status ggml_entropy_measure(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, const struct ggml_entropy_code * code,
        int64_t group0, int64_t group1, struct ggml_entropy_extent * extents);

struct ggml_entropy_spec {
    enum ggml_type   type;
    int64_t          n_cols;
    int64_t          n_rows;
    int64_t          n_slabs;            // of the tensor this slab belongs to
    const uint16_t * scales;             // f16 bits
    int64_t          n_scales;           // 1 or n_rows
    const float    * offsets;            // may be NULL
    int64_t          n_offsets;          // 0, 1 or n_rows
    int64_t          tile_cols;          // of the device layout
    uint64_t         device_size;        // ggml_entropy_lanes_size of the tensor's longest slab; 0 for EBF16
    const uint8_t  * rests;              // [n_rows][n_cols] for EBF16, whose one scale is 0; else NULL
};

// Bytes of a slab with these extents, slack included; 0 if it is not representable.
GGML_API size_t ggml_entropy_slab_size(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_code * code, const struct ggml_entropy_extent * extents);

// Write all sections but the body into slab, whose slab_size bytes the caller has zeroed (slab_size may exceed ggml_entropy_slab_size by
// a multiple of 256: slabs of one tensor are equally long).
GGML_API enum ggml_entropy_status ggml_entropy_begin(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_code * code, const struct ggml_entropy_extent * extents,
        void * slab, size_t slab_size);

// Write the row groups [group0, group1). Ranges that do not overlap may be written concurrently.
GGML_API enum ggml_entropy_status ggml_entropy_encode_groups(const int8_t * q, int64_t group0, int64_t group1, void * slab);

// Write the hash. Last step.
GGML_API enum ggml_entropy_status ggml_entropy_finish(void * slab, uint64_t seed);

#ifdef __cplusplus
}
#endif
