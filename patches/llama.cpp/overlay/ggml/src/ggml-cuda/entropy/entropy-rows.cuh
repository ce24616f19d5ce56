// SPDX-License-Identifier: MIT
//
// Compressed rows to rows of a stock type: whole row groups for large batches, single rows for GET_ROWS, and what a batch through quantized
// rows needs beside them.
//
// Decoding a tile gives a lane 32 columns of its row at a time. Rows want to be written by neighbouring threads, so a warp collects 32 rows
// x STAGE_COLS columns in shared memory, turned row by row, and writes them out together.

#pragma once

#include "entropy-mat-vec.cuh"

static constexpr int ENTROPY_STAGE_COLS   = 128;
// a row of the stage is 132 bytes: neighbouring rows begin in neighbouring banks
static constexpr int ENTROPY_STAGE_STRIDE = ENTROPY_STAGE_COLS + 4;
static constexpr int ENTROPY_STAGE_SIZE   = ENTROPY_LANES*ENTROPY_STAGE_STRIDE;

static constexpr int entropy_rows_shared_size(int n_warps) {
    return ENTROPY_TABLE_SIZE + n_warps*(ENTROPY_RING_SIZE + ENTROPY_STAGE_SIZE);
}

struct entropy_rows_args {
    const uint8_t * payload;
    int64_t         slab_stride;
    int             group0;       // first row group; grid x counts from here
    uint8_t       * to;           // row 0 of slab 0 of what is decoded
    int64_t         row_size;     // bytes
    int64_t         to_stride;    // bytes from slab to slab
    const int32_t * n_routes;     // [slabs]: a slab without any is left out; nullptr: all are decoded
};

// Code of symbol byte u of an EQ8 row; of the even or odd column of an EQ4 row.
ENTROPY_DEVICE int32_t entropy_code(uint32_t u, bool is_eq4, int col) {
    return is_eq4 ? (int32_t) (u >> 4*(col & 1) & 15) - 8 : (int32_t) u - 128;
}

// Collects units of a tile and writes them. PLAIN: F32, F16 (with offsets) or Q8_0, Q4_0 (without), or Q4_1.
template <ggml_type TYPE, ggml_type PLAIN>
struct entropy_row_writer {
    static constexpr bool is_eq4 = TYPE == GGML_TYPE_EQ4;
    static constexpr int  n_units_staged = ENTROPY_STAGE_COLS/32;

    const entropy_slab      & slab;
    const entropy_rows_args & args;
    uint8_t * rows;      // of this group
    uint32_t  stage;
    int       group;
    float     scale;     // of this lane's row, as offset
    float     offset;
    int       col0;      // of the stage
    int       n_units;   // of the slice that are to come
    int       place;     // of the next one in the stage

    ENTROPY_MEMBER void begin(int col, int n) {
        col0    = col;
        n_units = n;
        place   = 0;
    }

    // Symbols of a unit: 32 bytes for EQ8, 16 for EQ4, kept at 32 and 16 bytes a unit.
    ENTROPY_MEMBER void take(const uint32_t (&symbols)[entropy_traits<TYPE>::unit_words]) {
        ENTROPY_UNROLL
        for (int i = 0; i < entropy_traits<TYPE>::unit_words; i++) {
            shared_store<uint32_t>(stage + lane_id()*ENTROPY_STAGE_STRIDE + (place*entropy_traits<TYPE>::unit_words + i)*4, symbols[i]);
        }
        place++;
        n_units--;
        if (place == n_units_staged || n_units == 0) {
            warp_sync();
            write(place);
            warp_sync();
            col0 += place*32;
            place = 0;
        }
    }

    // Code of column col of the stage.
    ENTROPY_MEMBER int32_t code(int row, int col) const {
        return entropy_code(shared_read<uint8_t>(stage + row*ENTROPY_STAGE_STRIDE + (is_eq4 ? col/2 : col)), is_eq4, col);
    }

    ENTROPY_MEMBER void write(int n) const {
        const int n_lanes = slab.n_lanes(group);
        for (int r = 0; r < n_lanes; r++) {
            // of row r
            const float s = bits_float(warp_read(float_bits(scale),  r));
            const float o = bits_float(warp_read(float_bits(offset), r));
            if constexpr (PLAIN == GGML_TYPE_F32 || PLAIN == GGML_TYPE_F16) {
                write_floats(rows + r*args.row_size, r, n, s, o);
            } else {
                write_blocks(rows + r*args.row_size, r, n, s, o);
            }
        }
    }

    // Four columns a lane.
    ENTROPY_MEMBER void write_floats(uint8_t * to, int r, int n, float s, float o) const {
        const int c = lane_id()*4;
        if (c >= n*32) {
            return;
        }
        float w[4];
        if constexpr (is_eq4) {
            const uint32_t u = shared_read<uint16_t>(stage + r*ENTROPY_STAGE_STRIDE + c/2);
            ENTROPY_UNROLL
            for (int i = 0; i < 4; i++) {
                w[i] = add(multiply(s, (float) ((int32_t) (u >> 4*i & 15) - 8)), o);
            }
        } else {
            const uint32_t u = shared_read<uint32_t>(stage + r*ENTROPY_STAGE_STRIDE + c);
            ENTROPY_UNROLL
            for (int i = 0; i < 4; i++) {
                w[i] = add(multiply(s, (float) ((int32_t) (u >> 8*i & 255) - 128)), o);
            }
        }
        if constexpr (PLAIN == GGML_TYPE_F32) {
            global_store((float4 *) ((float *) to + col0 + c), make_float4(w[0], w[1], w[2], w[3]));
        } else {
            const uint32_t low  = float_to_half(w[0]) | (uint32_t) float_to_half(w[1]) << 16;
            const uint32_t high = float_to_half(w[2]) | (uint32_t) float_to_half(w[3]) << 16;
            global_store((uint2 *) ((uint16_t *) to + col0 + c), make_uint2(low, high));
        }
    }

    // Blocks of 32 weights are 34, 18 or 20 bytes: written as 17, 9 or 10 pairs of bytes, block after block.
    ENTROPY_MEMBER void write_blocks(uint8_t * to, int r, int n, float s, float o) const {
        constexpr int n_head  = PLAIN == GGML_TYPE_Q4_1 ? 2 : 1;
        constexpr int n_pairs = n_head + (PLAIN == GGML_TYPE_Q8_0 ? 16 : 8);
        uint16_t * blocks = (uint16_t *) to + col0/32*n_pairs;
        for (int i = lane_id(); i < n*n_pairs; i += 32) {
            const int unit = i/n_pairs;
            const int pair = i%n_pairs;
            uint16_t value;
            if (pair == 0) {
                value = float_to_half(s); // it was an f16
            } else if (pair < n_head) {
                value = float_to_half(add(o, -multiply(8.0f, s)));
            } else {
                const int j = (pair - n_head)*2;
                value = (uint16_t) (quants(r, unit*32, j) | quants(r, unit*32, j + 1) << 8);
            }
            global_store(blocks + i, value);
        }
    }

    // Byte j of the quants of the block that begins at column c0 of the stage.
    ENTROPY_MEMBER uint32_t quants(int row, int c0, int j) const {
        if constexpr (PLAIN == GGML_TYPE_Q8_0) {
            return (uint32_t) code(row, c0 + j) & 255;
        } else { // weight j below, weight j + 16 above
            return (uint32_t) (code(row, c0 + j) + 8) | (uint32_t) (code(row, c0 + j + 16) + 8) << 4;
        }
    }
};

// Grid: (row groups, slices or fewer, slabs). Warps take slices.
template <ggml_type TYPE, ggml_type PLAIN>
__global__ void __launch_bounds__(256, 2) entropy_decode_rows(const entropy_rows_args args) {
    const int i_slab = blockIdx.z;
    if (args.n_routes != nullptr && global_read(args.n_routes + i_slab) == 0) {
        return;
    }
    const entropy_slab slab(args.payload + i_slab*args.slab_stride);
    const uint32_t ring = ENTROPY_TABLE_SIZE + warp_id()*(ENTROPY_RING_SIZE + ENTROPY_STAGE_SIZE);
    entropy_fill_table(slab);
    block_sync();

    const int  group  = args.group0 + blockIdx.x;
    const int  row    = group*ENTROPY_LANES + lane_id();
    const bool exists = row < slab.n_rows;
    entropy_row_writer<TYPE, PLAIN> writer = {
        slab, args, args.to + i_slab*args.to_stride + (int64_t) blockIdx.x*ENTROPY_LANES*args.row_size, ring + ENTROPY_RING_SIZE, group,
        exists ? half_to_float(slab.scale(row)) : 0.0f, exists ? slab.offset(row) : 0.0f, 0, 0, 0,
    };
    ENTROPY_NOUNROLL
    for (int slice = blockIdx.y*n_warps() + warp_id(); slice < slab.n_slices; slice += gridDim.y*n_warps()) {
        entropy_ring words = entropy_next_ring(slab, group, slice, ring);
        entropy_decode_tile<TYPE>(slab, group, slice, words, writer);
    }
}

// ---- single rows -------------------------------------------------------------------------------------------------------------------

static constexpr int ENTROPY_LANE_WORDS = 256;
static constexpr int ENTROPY_LANE_SIZE  = ENTROPY_LANE_WORDS*4 + 1024; // words and symbols of one lane

static constexpr int entropy_get_rows_shared_size(int n_warps) {
    return 256*4 + n_warps*ENTROPY_LANE_SIZE;
}

struct entropy_get_rows_args {
    const uint8_t * payload;
    int64_t         slab_stride;
    const int32_t * ids;
    int64_t         ids_s0, ids_s1; // strides in int32
    int             n_rows;         // ids beyond are answered with zeros
    float         * to;
    int64_t         to_s1, to_s2;   // strides in floats
};

// Grid: (ids of a slab, slices / warps, slabs). A warp decodes one lane of one tile: it gathers the lane's words together, then one
// thread reads the codes one by one, then all write. A token embedding is 8 such warps; the kernel is over before that matters.
template <ggml_type TYPE>
__global__ void entropy_get_rows(const entropy_get_rows_args args) {
    using traits = entropy_traits<TYPE>;
    constexpr bool is_eq4 = TYPE == GGML_TYPE_EQ4;
    const int lane = lane_id();
    const entropy_slab slab(args.payload + blockIdx.z*args.slab_stride);
    const uint32_t words = 256*4 + warp_id()*ENTROPY_LANE_SIZE;
    const uint32_t bytes = words + ENTROPY_LANE_WORDS*4;
    const uint16_t * entries = slab.section<uint16_t>(slab.header()->table_at);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        shared_store<uint32_t>(i*4, global_load(entries + i));
    }
    block_sync();

    const int32_t row = global_load(args.ids + blockIdx.x*args.ids_s0 + blockIdx.z*args.ids_s1);
    float * to = args.to + blockIdx.x*args.to_s1 + blockIdx.z*args.to_s2;
    const bool exists = row >= 0 && row < args.n_rows;
    const int  group  = exists ? row/ENTROPY_LANES : 0;
    const int  mine   = exists ? row%ENTROPY_LANES : 0;
    const float scale  = exists ? half_to_float(slab.scale(row)) : 0.0f;
    const float offset = exists ? slab.offset(row) : 0.0f;

    for (int slice = blockIdx.y*n_warps() + warp_id(); slice < slab.n_slices; slice += gridDim.y*n_warps()) {
        const entropy_tile tile(slab, group, slice);
        const int n_cols    = slab.slice_cols(slice);
        const int n_symbols = n_cols/traits::cols_per_symbol;

        uint32_t begin  = 0;
        uint32_t length = 0; // of the lane that is wanted
        warp_sync();
        for (uint32_t j = 0; j < 255; j++) {
            const uint32_t mask = warp_ballot(j < tile.length);
            if ((mask >> mine & 1) == 0) {
                length = j;
                break; // all lanes see the same mask
            }
            if (lane == 0) {
                shared_store<uint32_t>(words + j*4, global_load(tile.words + begin + count_bits(mask & ((1u << mine) - 1))));
            }
            begin += count_bits(mask);
            length = j + 1;
        }
        warp_sync();
        if (lane == 0) {
            uint32_t position = 0;
            for (int k = 0; k < n_symbols; k++) {
                const uint32_t j  = position/32;
                const uint32_t w0 = j     < length ? shared_read<uint32_t>(words + j*4)       : 0;
                const uint32_t w1 = j + 1 < length ? shared_read<uint32_t>(words + (j + 1)*4) : 0;
                const uint32_t window = funnel_left(w1, w0, position);
                const uint32_t entry  = shared_read<uint32_t>((window >> 24)*4);
                const uint32_t t      = entry & 255;
                shared_store<uint8_t>(bytes + k, (uint8_t) ((window >> (32 - t)) + (entry >> 8)));
                position += t;
            }
        }
        warp_sync();
        for (int c = lane; c < n_cols; c += 32) {
            const int32_t code = entropy_code(shared_read<uint8_t>(bytes + c/traits::cols_per_symbol), is_eq4, c);
            global_store(to + slice*slab.tile_cols + c, add(multiply(scale, (float) code), offset));
        }
    }
}

// ---- batches through rows without offsets --------------------------------------------------------------------------------------------

// How many columns each expert gets. One block.
static __global__ void entropy_count_routes(const int32_t * ids, int64_t s0, int64_t s1, int n_slots, int n_tokens, int n_experts,
        int32_t * n_routes) {
    for (int e = threadIdx.x; e < n_experts; e += blockDim.x) {
        global_store(n_routes + e, 0);
    }
    block_sync();
    for (int64_t i = threadIdx.x; i < (int64_t) n_slots*n_tokens; i += blockDim.x) {
        const int32_t e = global_load(ids + i%n_slots*s0 + i/n_slots*s1);
        if (e >= 0 && e < n_experts) {
            global_store(n_routes + e, 1); // any number above zero will do
        }
    }
}

struct entropy_offsets_args {
    const uint8_t * payload;
    int64_t         slab_stride;
    entropy_source  source;
    float         * y;
    int64_t         y1, y2, y3;     // strides in floats
    int             n_cols;
    // as in entropy_mat_vec_args
    int             planes_per_slab;
    const int32_t * ids;
    int64_t         ids_s0, ids_s1;
    int             n_experts;
};

// y[column][row] += offset[row] * sum(x[column]). Grid: (columns, i2, i3); with ids (1, slots, tokens).
static __global__ void entropy_add_offsets(const entropy_offsets_args args) {
    int64_t       i_slab = blockIdx.y/args.planes_per_slab;
    const float * x      = args.source.data + blockIdx.x*args.source.s1 + blockIdx.y*args.source.s2 + blockIdx.z*args.source.s3;
    float       * y      = args.y + blockIdx.x*args.y1 + blockIdx.y*args.y2 + blockIdx.z*args.y3;
    if (args.ids != nullptr) {
        i_slab = global_load(args.ids + blockIdx.y*args.ids_s0 + blockIdx.z*args.ids_s1);
        if (i_slab < 0 || i_slab >= args.n_experts) {
            return; // the whole block
        }
        x = args.source.data + blockIdx.y % args.source.n1*args.source.s1 + blockIdx.z*args.source.s2;
        y = args.y + blockIdx.y*args.y1 + blockIdx.z*args.y2;
    }
    const entropy_slab slab(args.payload + i_slab*args.slab_stride);
    if (slab.offset_mode == GGML_ENTROPY_OFFSET_NONE) {
        return; // the whole block
    }
    float sum = 0.0f;
    for (int i = threadIdx.x; i < args.n_cols; i += blockDim.x) {
        sum += global_load(x + i);
    }
    shared_store<float>(threadIdx.x*4, sum);
    block_sync();
    sum = 0.0f;
    for (int i = 0; i < (int) blockDim.x; i++) {
        sum += shared_read<float>(i*4);
    }
    for (int row = threadIdx.x; row < slab.n_rows; row += blockDim.x) {
        global_store(y + row, global_read(y + row) + slab.offset(row)*sum);
    }
}
