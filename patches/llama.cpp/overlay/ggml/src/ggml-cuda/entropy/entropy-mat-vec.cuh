// SPDX-License-Identifier: MIT
//
// A compressed matrix times a few columns: y[column][row] = w[row] . x[column]. Decoding is the work; a decoded unit stays in registers
// and meets every column there.
//
// First a kernel quantizes the columns of src1 to int8, blocks of 32 with a scale, laid out as the second kernel reads them. Then a
// block owns one row group: its warps take the column slices in turn, lane = row, and add up in shared memory at the end. Products are
// dp4a of unsigned symbols and signed activations; the zero point of the symbols (128, or 8) is taken out beforehand by starting a
// unit's sum at -zero * sum(x).
//
// Weights with offsets: w = s*q + o gives s*sum(q*x) + o*sum(x). Their columns come as two int8 terms, the second for what the first left
// over, as on the CPU (docs/decisions.md): the host does not know whether a slab has offsets, so the kernels look. All slabs of a tensor
// have the same modes, but only slabs that are used may be looked at: of experts that are copied for one op the others may hold anything.

#pragma once

#include "entropy-decode.cuh"

// 32 activations as the kernel reads them: three loads of 16 bytes. EQ4 wants the even columns of eight first, then the odd ones, as
// nibbles come.
struct alignas(16) entropy_block {
    float   scale;
    int32_t start;     // -zero * (sum of the codes)
    int32_t unused[2];
    int8_t  codes[32];
};

static_assert(sizeof(entropy_block) == 48, "three times 16 bytes");

// Columns of src1: blocks [n_terms][n_columns][n_cols/32].
struct entropy_columns {
    entropy_block * blocks;
    int64_t n_columns;
    int     n_cols;

    static constexpr int n_terms = 2;

    static size_t n_blocks(int64_t n_columns, int64_t n_cols) {
        return n_terms*n_columns*(n_cols/32);
    }

    ENTROPY_MEMBER entropy_block * column(int term, int64_t i) const {
        return blocks + (term*n_columns + i)*(n_cols/32);
    }
};

// Where column i of src1 stands.
struct entropy_source {
    const float * data;
    int64_t n1, n2;         // ne11, ne12
    int64_t s1, s2, s3;     // strides in floats
};

// MUL_MAT_ID: the experts of each token. ids is nullptr for MUL_MAT, which uses all slabs.
struct entropy_routes {
    const int32_t * ids;
    int64_t         s0, s1;     // strides in int32: slot, token
    int             n_slots;
    int             n_experts;

    // A slab that the token uses; -1 if it uses none.
    ENTROPY_MEMBER int64_t used_slab(int64_t token) const {
        if (ids == nullptr) {
            return 0;
        }
        for (int slot = 0; slot < n_slots; slot++) {
            const int32_t expert = global_read(ids + slot*s0 + token*s1);
            if (expert >= 0 && expert < n_experts) {
                return expert;
            }
        }
        return -1;
    }
};

struct entropy_quantize_args {
    const uint8_t * payload[2]; // of the matrices that the columns meet
    int64_t         slab_stride[2];
    entropy_routes  routes;
    entropy_source  source;
    entropy_columns columns;

    ENTROPY_MEMBER bool has_offset(int64_t i_slab) const {
        return entropy_slab(payload[0] + i_slab*slab_stride[0]).offset_mode != GGML_ENTROPY_OFFSET_NONE
            || entropy_slab(payload[1] + i_slab*slab_stride[1]).offset_mode != GGML_ENTROPY_OFFSET_NONE;
    }
};

// Grid: (units of a column / warps, columns). One warp quantizes one unit, as quantize_row_q8_0 does.
template <ggml_type TYPE>
__global__ void entropy_quantize_columns(const entropy_quantize_args args) {
    grid_release();
    const int     unit   = blockIdx.x*n_warps() + warp_id();
    const int64_t column = blockIdx.y + (int64_t) blockIdx.z*gridDim.y;
    const int     n_units = args.columns.n_cols/32;
    if (unit >= n_units || column >= args.columns.n_columns) {
        return;
    }
    const entropy_source & from = args.source;
    const int64_t i1 = column % from.n1;
    const int64_t i2 = column / from.n1 % from.n2;
    const int64_t i3 = column / from.n1 / from.n2;
    const int     lane = lane_id();
    grid_wait();
    float x = global_read(from.data + i1*from.s1 + i2*from.s2 + i3*from.s3 + unit*32 + lane);

    // place of this lane's code among the unit's
    const int place = TYPE == GGML_TYPE_EQ4 ? lane/8*8 + lane%2*4 + lane%8/2 : lane;

    const int64_t i_slab  = args.routes.used_slab(i2); // planes are tokens where there are routes
    const int     n_terms = i_slab >= 0 && args.has_offset(i_slab) ? 2 : 1;
    for (int term = 0; term < n_terms; term++) {
        // the largest magnitude: as bits, positive floats are in order
        const float   largest = bits_float(warp_max(float_bits(x) & 0x7FFFFFFF));
        const float   scale   = largest/127.0f;
        const int32_t code    = scale > 0.0f ? round_to_int(x/scale) : 0;
        const int32_t sum     = warp_sum(code);
        entropy_block * block = args.columns.column(term, column) + unit;
        global_store(block->codes + place, (int8_t) code);
        if (lane == 0) {
            global_store((int4 *) block, make_int4((int) float_bits(scale), -entropy_traits<TYPE>::zero*sum, 0, 0));
        }
        x = add(x, -multiply(scale, (float) code));
    }
}

// One or two matrices of the same type that meet the same columns, as a gate and its up-projection do: one launch fills a GPU that either
// alone would not. The second begins at row group n_groups.
struct entropy_mat_vec_args {
    const uint8_t * payload[2];
    int64_t         slab_stride[2];
    float         * y[2];
    int64_t         y1[2], y2[2], y3[2]; // strides in floats: column, plane
    int             n_groups;       // of the first matrix
    entropy_columns columns;
    // MUL_MAT: block (., i2, i3) takes slab i2 / planes_per_slab and the columns of plane (i2, i3)
    int64_t         n1, n2;         // ne11, ne12
    int             planes_per_slab;
    // MUL_MAT_ID: block (., slot, token) takes the expert that ids tells and one column
    const int32_t * ids;            // nullptr for MUL_MAT
    int64_t         ids_s0, ids_s1; // strides in int32
    int             n_experts;
};

// What a warp adds up over its slices: for each column of its lane's row the dot product and, with offsets, the sum of the column.
template <ggml_type TYPE, int N_COLUMNS, int N_TERMS>
struct entropy_dot {
    const entropy_block * first; // of the first column
    const entropy_block * next;  // the block that comes
    int64_t term_stride;         // in blocks
    int     column_stride;
    float   dot[N_COLUMNS];
    float   sum[N_COLUMNS]; // times -zero

    ENTROPY_MEMBER entropy_dot(const entropy_columns & x, int64_t column0) :
            first(x.column(0, column0)), next(nullptr), term_stride(x.n_columns*(x.n_cols/32)), column_stride(x.n_cols/32) {
        ENTROPY_UNROLL
        for (int c = 0; c < N_COLUMNS; c++) {
            dot[c] = sum[c] = 0.0f;
        }
    }

    ENTROPY_MEMBER void begin(int col, int) {
        next = first + col/32;
    }

    ENTROPY_MEMBER void take(const uint32_t (&symbols)[entropy_traits<TYPE>::unit_words]) {
        ENTROPY_UNROLL
        for (int term = 0; term < N_TERMS; term++) {
            ENTROPY_UNROLL
            for (int c = 0; c < N_COLUMNS; c++) {
                // all lanes read the same: one broadcast from the L1 cache
                const int4 * block = (const int4 *) (next + term*term_stride + c*column_stride);
                const int2   unit  = global_read((const int2 *) block);
                const int4   a     = global_read(block + 1);
                const int4   b     = global_read(block + 2);
                int32_t p = unit.y;
                if constexpr (TYPE == GGML_TYPE_EQ8) {
                    p = dot_u8_s8(symbols[0], a.x, p);
                    p = dot_u8_s8(symbols[1], a.y, p);
                    p = dot_u8_s8(symbols[2], a.z, p);
                    p = dot_u8_s8(symbols[3], a.w, p);
                    p = dot_u8_s8(symbols[4], b.x, p);
                    p = dot_u8_s8(symbols[5], b.y, p);
                    p = dot_u8_s8(symbols[6], b.z, p);
                    p = dot_u8_s8(symbols[7], b.w, p);
                } else {
                    p = dot_u8_s8(symbols[0]      & 0x0F0F0F0F, a.x, p);
                    p = dot_u8_s8(symbols[0] >> 4 & 0x0F0F0F0F, a.y, p);
                    p = dot_u8_s8(symbols[1]      & 0x0F0F0F0F, a.z, p);
                    p = dot_u8_s8(symbols[1] >> 4 & 0x0F0F0F0F, a.w, p);
                    p = dot_u8_s8(symbols[2]      & 0x0F0F0F0F, b.x, p);
                    p = dot_u8_s8(symbols[2] >> 4 & 0x0F0F0F0F, b.y, p);
                    p = dot_u8_s8(symbols[3]      & 0x0F0F0F0F, b.z, p);
                    p = dot_u8_s8(symbols[3] >> 4 & 0x0F0F0F0F, b.w, p);
                }
                const float scale = bits_float(unit.x);
                dot[c] += scale*(float) p;
                if constexpr (N_TERMS > 1) {
                    sum[c] += scale*(float) unit.y;
                }
            }
        }
        next++;
    }
};

// Shared memory: table, then a ring for each warp; sums take the place of the rings.
static constexpr int entropy_mat_vec_shared_size(int n_warps) {
    return ENTROPY_TABLE_SIZE + n_warps*ENTROPY_RING_SIZE;
}

// What the table and the words wait for is asked for first, all at once, while the kernels ahead may still be at work.
template <ggml_type TYPE, int N_COLUMNS, int N_TERMS>
ENTROPY_DEVICE void entropy_mat_vec_group(const entropy_columns & columns, const entropy_slab & slab, int group, int64_t column0, float * y,
        int64_t y1) {
    const uint32_t rings = ENTROPY_TABLE_SIZE;
    const uint32_t own   = rings + warp_id()*ENTROPY_RING_SIZE;

    int slice = warp_id();
    // a warp that has no tile looks at the last one, and decodes nothing of it
    entropy_ring ring(entropy_tile(slab, group, slice < slab.n_slices ? slice : slab.n_slices - 1), own, slab.n_lanes(group));
    ring.start();
    const int lane = lane_id();
    const int row  = group*ENTROPY_LANES + lane;
    const float scale  = lane < slab.n_lanes(group) ? half_to_float(slab.scale(row)) : 0.0f;
    const float offset = N_TERMS > 1 && lane < slab.n_lanes(group) ? slab.offset(row)/-entropy_traits<TYPE>::zero : 0.0f;
    entropy_fill_table(slab);
    grid_wait();
    block_sync();

    entropy_dot<TYPE, N_COLUMNS, N_TERMS> dot(columns, column0);
    ENTROPY_NOUNROLL
    while (slice < slab.n_slices) {
        entropy_decode_tile<TYPE>(slab, group, slice, ring, dot);
        slice += n_warps();
        if (slice < slab.n_slices) {
            ring = entropy_next_ring(slab, group, slice, own);
        }
    }

    async_wait<0>();
    block_sync(); // rings are at rest
    ENTROPY_UNROLL
    for (int c = 0; c < N_COLUMNS; c++) {
        float value = scale*dot.dot[c];
        if constexpr (N_TERMS > 1) {
            value += offset*dot.sum[c];
        }
        shared_store<float>(rings + ((warp_id()*N_COLUMNS + c)*ENTROPY_LANES + lane)*4, value);
    }
    block_sync();
    for (int c = warp_id(); c < N_COLUMNS; c += n_warps()) {
        float value = 0.0f;
        for (int w = 0; w < n_warps(); w++) {
            value += shared_read<float>(rings + ((w*N_COLUMNS + c)*ENTROPY_LANES + lane)*4);
        }
        if (lane < slab.n_lanes(group)) {
            global_store(y + c*y1 + row, value);
        }
    }
}

// Grid: (row groups of both matrices, i2, i3) or (row groups, slots, tokens).
template <ggml_type TYPE, int N_COLUMNS>
__global__ void __launch_bounds__(N_COLUMNS <= 4 ? 1024 : 512, 1) entropy_mat_vec(const entropy_mat_vec_args args) {
    grid_release();
    const int which = (int) blockIdx.x >= args.n_groups;
    const int group = (int) blockIdx.x - which*args.n_groups;
    int64_t i_slab  = blockIdx.y/args.planes_per_slab;
    int64_t column0 = (blockIdx.z*args.n2 + blockIdx.y)*args.n1;
    float * y       = args.y[which] + blockIdx.y*args.y2[which] + blockIdx.z*args.y3[which];
    if (args.ids != nullptr) {
        grid_wait(); // which weights come, other kernels decide
        const int32_t expert = global_read(args.ids + blockIdx.y*args.ids_s0 + blockIdx.z*args.ids_s1);
        if (expert < 0 || expert >= args.n_experts) {
            return; // the whole block
        }
        i_slab  = expert;
        column0 = blockIdx.z*args.n1 + blockIdx.y % args.n1;
    }
    const entropy_slab slab(args.payload[which] + i_slab*args.slab_stride[which]);
    if (slab.offset_mode == GGML_ENTROPY_OFFSET_NONE) {
        entropy_mat_vec_group<TYPE, N_COLUMNS, 1>(args.columns, slab, group, column0, y, args.y1[which]);
    } else {
        entropy_mat_vec_group<TYPE, N_COLUMNS, 2>(args.columns, slab, group, column0, y, args.y1[which]);
    }
}
