// SPDX-License-Identifier: MIT
//
// Ops with entropy-coded weights on the CPU; see entropy-cpu.h.
//
// MUL_MAT and MUL_MAT_ID in three steps: quantize the columns of src1 to Q8_0, as ggml does for Q8_0 and Q4_0 weights; then threads take
// row groups from a counter; a row group is decoded once, into 32 rows of Q8_0 (EQ8) or Q4_0 (EQ4) in the thread's scratch, and
// multiplied with every column. So weights without offsets give the very sums of a stock Q8_0 or Q4_0 tensor.
//
// Weights with offsets stand in for F16 and Q4_1. The offsets are left out of the rows and added at the end: w = s*q + o gives
// sum(w*x) = sum(s*q*x) + o*sum(x), with sum(x) over the quantized x. And a column is quantized twice, first itself and then what the
// first time left over, which makes it nearly exact: 8 bits alone cost 0.5 % of perplexity against F16 (docs/decisions.md).
//
// The scratch of a thread (whole rows of one group, 34 bytes for 32 columns: 139 KB for 4096 columns, and a decoder of 82 KB) is meant to stay in
// its L2 cache. Everything stands in the graph's work buffer; nothing is allocated here.
//
// Payloads were validated when the model was loaded (llama-entropy.cpp); headers are read again here only to find the sections.

#include "entropy-cpu.h"
#include "entropy-kernel.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

static constexpr int LANES = GGML_ENTROPY_LANES;

// Q8_0 blocks that stand for one block of a column, if the weights have offsets.
static constexpr int N_TERMS = 2;

// Columns of src1 that are multiplied at a time. As a matrix product: 64 of them and the rows of a group are 410 KB for 4096 weights a row,
// about an L2 cache. One by one: 8 columns and a row fit in an L1 cache for up to 3000 weights a row.
static constexpr int COLUMN_BLOCK     = 64;
static constexpr int COLUMN_BLOCK_DOT = 8;

static bool is_mine(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_GET_ROWS:
            return ggml_entropy_is_type(op->src[0]->type);
        default:
            return false;
    }
}

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (op->op == GGML_OP_NONE) {
        return true;
    }
    const ggml_tensor * w = op->src[0];
    if (!is_mine(op) || op->type != GGML_TYPE_F32 || w->ne[3] != 1) {
        return false;
    }
    // a buffer that repacks or slices is not for payloads
    if (w->buffer != nullptr && !ggml_backend_buft_is_host(ggml_backend_buffer_get_type(w->buffer))) {
        return false;
    }
    const ggml_tensor * x = op->src[1];
    switch (op->op) {
        case GGML_OP_MUL_MAT:    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float);
        case GGML_OP_MUL_MAT_ID: return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && op->src[2]->type == GGML_TYPE_I32;
        default:                 return x->type == GGML_TYPE_I32;
    }
}

static const char * active_kernel() {
    return ggml_entropy_kernel_active().name;
}

void * ggml_cpu_entropy_get_proc_address(const char * name) {
    if (std::strcmp(name, "ggml_backend_entropy_supports_op") == 0) {
        return (void *) supports_op;
    }
    if (std::strcmp(name, "ggml_backend_entropy_kernel") == 0) {
        return (void *) active_kernel;
    }
    if (std::strcmp(name, "ggml_backend_entropy_kernels") == 0) {
        return (void *) ggml_entropy_kernel_names;
    }
    return nullptr;
}

// ---- work buffer -------------------------------------------------------------------------------------------------------------------

// Which column of src1 (token, slot) goes through an expert, sorted by expert.
struct route {
    int32_t slot;
    int32_t token;
};

// Parts of the work buffer, in bytes from its start. Columns, their sums and the routes are shared; then comes a scratch for each thread.
struct work_layout {
    size_t column_size = 0; // of a column of src1 as Q8_0; N_TERMS times all columns
    size_t row_size    = 0; // of a decoded row
    size_t sums        = 0; // float [n_columns]
    size_t first_route = 0; // int32_t [n_experts + 1]
    size_t active      = 0; // int32_t [n_experts]: those with routes
    size_t routes      = 0; // route [n_routes]
    size_t threads     = 0;
    size_t thread_size = 0; // ggml_entropy_decoder, decoded rows
    size_t end         = 0;

    work_layout(const ggml_tensor * op, int n_threads) {
        const ggml_tensor * w = op->src[0];
        const ggml_tensor * x = op->src[1];
        if (op->op != GGML_OP_GET_ROWS) {
            column_size = ggml_row_size(GGML_TYPE_Q8_0, x->ne[0]);
            row_size    = ggml_row_size(w->type == GGML_TYPE_EQ8 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0, w->ne[0]);
            sums        = part(0, column_size*ggml_nrows(x)*N_TERMS);
            first_route = part(sums, sizeof(float)*ggml_nrows(x));
            active = routes = threads = first_route;
        }
        if (op->op == GGML_OP_MUL_MAT_ID) {
            active  = part(first_route, sizeof(int32_t)*(w->ne[2] + 1));
            routes  = part(active,      sizeof(int32_t)*w->ne[2]);
            threads = part(routes,      sizeof(route)*ggml_nelements(op->src[2]));
        }
        thread_size = part(GGML_PAD(sizeof(ggml_entropy_decoder), 64), row_size*LANES);
        end         = threads + thread_size*n_threads;
    }

private:
    // where the next part starts; parts are cache lines apart, so that threads do not share any
    static size_t part(size_t at, size_t n_bytes) {
        return GGML_PAD(at + n_bytes, 64);
    }
};

// What one thread computes with.
struct worker {
    ggml_compute_params       * params;
    const ggml_tensor         * w;
    const ggml_tensor         * x;
    bool                        has_offset; // all slabs alike
    work_layout                 layout;
    const ggml_entropy_kernel & kernel;
    ggml_entropy_decoder      * decoder;
    char                      * rows;
    int64_t                     i_slab = -1; // that the decoder is open for

    worker(ggml_compute_params * params, const ggml_tensor * op) :
            params(params), w(op->src[0]), x(op->src[1]),
            has_offset(((const ggml_entropy_header *) w->data)->offset_mode != GGML_ENTROPY_OFFSET_NONE), layout(op, params->nth),
            kernel(params->use_ref ? *ggml_entropy_kernel_find("ref") : ggml_entropy_kernel_active()) {
        // aligned here: the caller's work buffer may start anywhere
        GGML_ASSERT(params->wsize >= layout.end + 64);
        char * scratch = base() + layout.threads + layout.thread_size*params->ith;
        decoder = (ggml_entropy_decoder *) scratch;
        rows    = scratch + GGML_PAD(sizeof(ggml_entropy_decoder), 64);
    }

    char * base() const {
        return (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    }

    template <typename T>
    T * at(size_t offset) const {
        return (T *) (base() + offset);
    }

    void open(int64_t i) {
        if (i_slab == i) {
            return;
        }
        ggml_entropy_view view;
        const ggml_entropy_status status = ggml_entropy_open((const char *) w->data + i*w->nb[2], w->nb[2], &view);
        if (status != GGML_ENTROPY_OK) {
            GGML_ABORT("tensor '%s': %s; it was not validated or its memory was overwritten", w->name, ggml_entropy_status_str(status));
        }
        ggml_entropy_decoder_open(decoder, &view);
        i_slab = i;
    }

    const block_q8_0 * column(int term, int64_t i) const {
        return at<block_q8_0>(layout.column_size*(term*ggml_nrows(x) + i));
    }

    int n_lanes(int64_t group) const {
        return (int) std::min<int64_t>(LANES, w->ne[1] - group*LANES);
    }
};

// ---- matrix multiplication ---------------------------------------------------------------------------------------------------------

// Sum of a column as the kernels see it, in float: the sum that block_q8_1 carries is an f16, too coarse for large offsets.
static float sum_of(const block_q8_0 * x, int64_t n_blocks) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n_blocks; i++) {
        int q = 0;
        for (int j = 0; j < QK8_0; j++) {
            q += x[i].qs[j];
        }
        sum += GGML_FP16_TO_FP32(x[i].d) * (float) q;
    }
    return sum;
}

// What a Q8_0 column leaves over of the floats it was made from.
static void subtract(const float * from, const block_q8_0 * x, int64_t n_blocks, float * rest) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const float d = GGML_FP16_TO_FP32(x[i].d);
        for (int j = 0; j < QK8_0; j++) {
            rest[i*QK8_0 + j] = from[i*QK8_0 + j] - d*(float) x[i].qs[j];
        }
    }
}

// Columns of src1, in the order of i11, i12, i13, to Q8_0; threads share them.
static void quantize_columns(worker & wk) {
    const ggml_from_float_t quantize = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
    const ggml_tensor * x = wk.x;
    const int64_t n_blocks = x->ne[0]/QK8_0;
    for (int64_t c = wk.params->ith; c < ggml_nrows(x); c += wk.params->nth) {
        const int64_t i11 = c % x->ne[1];
        const int64_t i12 = c / x->ne[1] % x->ne[2];
        const int64_t i13 = c / x->ne[1] / x->ne[2];
        const float * from = (const float *) ((const char *) x->data + i11*x->nb[1] + i12*x->nb[2] + i13*x->nb[3]);
        block_q8_0 * to = (block_q8_0 *) wk.column(0, c);
        quantize(from, to, x->ne[0]);
        if (wk.has_offset) {
            // the scratch for rows is free now and, 18 bytes a column at least, large enough for a column of floats
            float      * rest    = (float *) wk.rows;
            block_q8_0 * to_rest = (block_q8_0 *) wk.column(1, c);
            subtract(from, to, n_blocks, rest);
            quantize(rest, to_rest, x->ne[0]);
            wk.at<float>(wk.layout.sums)[c] = sum_of(to, n_blocks) + sum_of(to_rest, n_blocks);
        }
    }
}

static ggml_type row_type(const worker & wk) {
    return wk.w->type == GGML_TYPE_EQ8 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0;
}

// A row group of the slab that is open into the rows of the scratch.
static void decode_group(worker & wk, int64_t group) {
    const int n_lanes = wk.n_lanes(group);
    for (int64_t slice = 0; slice < wk.decoder->view.n_slices; slice++) {
        wk.kernel.decode_lanes(wk.decoder, group, slice, 0, n_lanes);
        ggml_entropy_decoder_rows(wk.decoder, group, slice, 0, n_lanes, row_type(wk), wk.rows, wk.layout.row_size);
    }
}

// To the products of a group's rows with a column: those with its second term, and what the offsets add.
static void add_offsets(const worker & wk, int64_t group, const float * rest, int64_t column, float * dst) {
    const float sum = wk.at<float>(wk.layout.sums)[column];
    for (int l = 0; l < wk.n_lanes(group); l++) {
        dst[l] += rest[l] + ggml_entropy_row_offset(&wk.decoder->view, group*LANES + l)*sum;
    }
}

// The rows times n > 1 columns that stand side by side, as a matrix product; the results of a column are dst_stride floats apart. False, and
// nothing done, if the kernel has no product for them.
static bool multiply_adjacent(worker & wk, int64_t group, int64_t first, int64_t n, float * dst, int64_t dst_stride) {
    const int64_t n_blocks = wk.w->ne[0]/QK8_0;
    const int     n_lanes  = wk.n_lanes(group);
    for (int64_t i0 = 0, n_block; i0 < n; i0 += n_block) {
        n_block = std::min<int64_t>(COLUMN_BLOCK, n - i0);
        if (n - i0 - n_block == 1) {
            n_block--; // ggml's products are of two columns or more, and so are stock types' for this one
        }
        float * to = dst + i0*dst_stride;
        if (!wk.kernel.multiply(row_type(wk), wk.rows, wk.column(0, first + i0), n_lanes, n_block, n_blocks, to, dst_stride)) {
            return false;
        }
        if (wk.has_offset) {
            float rest[COLUMN_BLOCK*LANES];
            wk.kernel.multiply(row_type(wk), wk.rows, wk.column(1, first + i0), n_lanes, n_block, n_blocks, rest, LANES);
            for (int64_t i = 0; i < n_block; i++) {
                add_offsets(wk, group, rest + i*LANES, first + i0 + i, to + i*dst_stride);
            }
        }
    }
    return true;
}

// The rows times n columns that may stand anywhere: where(i, &column, &dst) tells the number of column i in the work buffer and the result
// column in dst.
template <typename Where>
static void multiply_scattered(worker & wk, int64_t group, int64_t n, const Where & where) {
    const ggml_vec_dot_t dot     = wk.w->type == GGML_TYPE_EQ8 ? wk.kernel.dot_eq8 : wk.kernel.dot_eq4;
    const int            n_lanes = wk.n_lanes(group);
    for (int64_t i0 = 0; i0 < n; i0 += COLUMN_BLOCK_DOT) {
        const int n_block = (int) std::min<int64_t>(COLUMN_BLOCK_DOT, n - i0);
        int64_t column[COLUMN_BLOCK_DOT];
        float * dst   [COLUMN_BLOCK_DOT];
        for (int i = 0; i < n_block; i++) {
            where(i0 + i, &column[i], &dst[i]);
            dst[i] += group*LANES;
        }
        float rest[COLUMN_BLOCK_DOT][LANES];
        for (int l = 0; l < n_lanes; l++) {
            const char * row = wk.rows + l*wk.layout.row_size;
            for (int i = 0; i < n_block; i++) {
                dot((int) wk.w->ne[0], &dst[i][l], 0, row, 0, wk.column(0, column[i]), 0, 1);
                if (wk.has_offset) {
                    dot((int) wk.w->ne[0], &rest[i][l], 0, row, 0, wk.column(1, column[i]), 0, 1);
                }
            }
        }
        for (int i = 0; wk.has_offset && i < n_block; i++) {
            add_offsets(wk, group, rest[i], column[i], dst[i]);
        }
    }
}

// Every thread begins with the unit of its own number; the counter hands out the others.
static void start_counter(const worker & wk) {
    if (wk.params->ith == 0) {
        ggml_threadpool_chunk_set(wk.params->threadpool, wk.params->nth);
    }
    ggml_barrier(wk.params->threadpool);
}

static int64_t next_unit(const worker & wk) {
    return ggml_threadpool_chunk_add(wk.params->threadpool, 1);
}

// dst[i13][i12][i11][row] = w[i12 / r2][row] . x[i13][i12][i11]
static void mul_mat(worker & wk, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[1];
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    GGML_ASSERT(wk.w->ne[3] == 1 && x->ne[2] % wk.w->ne[2] == 0);

    quantize_columns(wk);
    start_counter(wk);

    const int64_t n_slabs  = wk.w->ne[2];
    const int64_t n_groups = (wk.w->ne[1] + LANES - 1)/LANES;
    const int64_t n_i11    = x->ne[1];
    const int64_t n_i12    = x->ne[2]/n_slabs; // planes of src1 that share a slab
    const int64_t n_planes = n_i12*x->ne[3];
    for (int64_t unit = wk.params->ith; unit < n_slabs*n_groups; unit = next_unit(wk)) {
        const int64_t i_slab = unit/n_groups;
        const int64_t group  = unit % n_groups;
        const auto where = [&](int64_t i, int64_t * column, float ** to) {
            const int64_t i11 = i % n_i11;
            const int64_t i12 = i / n_i11 % n_i12 + i_slab*n_i12;
            const int64_t i13 = i / n_i11 / n_i12;
            *column = (i13*x->ne[2] + i12)*n_i11 + i11;
            *to     = (float *) ((char *) dst->data + i11*dst->nb[1] + i12*dst->nb[2] + i13*dst->nb[3]);
        };
        wk.open(i_slab);
        decode_group(wk, group);
        // as for stock types: a matrix product for each plane of several columns. It is there for all or for none
        bool done = n_i11 > 1;
        for (int64_t i = 0; done && i < n_planes; i++) {
            int64_t first;
            float * to;
            where(i*n_i11, &first, &to);
            done = multiply_adjacent(wk, group, first, n_i11, to + group*LANES, dst->nb[1]/sizeof(float));
        }
        if (!done) {
            multiply_scattered(wk, group, n_i11*n_planes, where);
        }
    }
}

// Sort the columns by expert; active lists the experts that have any and ends with -1 if some have none. One thread does it.
static void sort_routes(const worker & wk, const ggml_tensor * ids) {
    const int32_t n_experts = (int32_t) wk.w->ne[2];
    int32_t * first  = wk.at<int32_t>(wk.layout.first_route);
    int32_t * active = wk.at<int32_t>(wk.layout.active);
    route   * routes = wk.at<route>(wk.layout.routes);
    const auto expert_of = [&](int64_t slot, int64_t token) {
        const int32_t expert = *(const int32_t *) ((const char *) ids->data + slot*ids->nb[0] + token*ids->nb[1]);
        GGML_ASSERT(expert >= 0 && expert < n_experts);
        return expert;
    };

    std::fill(first, first + n_experts + 1, 0);
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
            first[expert_of(slot, token) + 1]++;
        }
    }
    int32_t n_active = 0;
    for (int32_t e = 0; e < n_experts; e++) {
        if (first[e + 1] > 0) {
            active[n_active++] = e;
        }
        first[e + 1] += first[e];
    }
    if (n_active < n_experts) {
        active[n_active] = -1;
    }
    // first[e] moves to the end of e's routes, which is where e + 1 starts: shifted back below
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
            routes[first[expert_of(slot, token)]++] = { (int32_t) slot, (int32_t) token };
        }
    }
    std::copy_backward(first, first + n_experts, first + n_experts + 1);
    first[0] = 0;
}

// dst[token][slot][row] = w[ids[token][slot]][row] . x[token][slot % ne11]
static void mul_mat_id(worker & wk, ggml_tensor * dst) {
    const ggml_tensor * x   = dst->src[1];
    const ggml_tensor * ids = dst->src[2];
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) && ids->type == GGML_TYPE_I32);
    GGML_ASSERT(wk.w->ne[3] == 1 && x->ne[3] == 1 && ids->ne[2] == 1 && ids->ne[3] == 1);

    quantize_columns(wk);
    if (wk.params->ith == 0) {
        sort_routes(wk, ids);
    }
    start_counter(wk);

    const int32_t * first  = wk.at<int32_t>(wk.layout.first_route);
    const int32_t * active = wk.at<int32_t>(wk.layout.active);
    const route   * routes = wk.at<route>(wk.layout.routes);
    const int64_t n_experts = wk.w->ne[2];
    const int64_t n_active  = std::find(active, active + n_experts, -1) - active;
    const int64_t n_groups  = (wk.w->ne[1] + LANES - 1)/LANES;
    for (int64_t unit = wk.params->ith; unit < n_active*n_groups; unit = next_unit(wk)) {
        const int32_t expert = active[unit/n_groups];
        const int64_t group  = unit % n_groups;
        wk.open(expert);
        decode_group(wk, group);
        // one by one, as for stock types
        multiply_scattered(wk, group, first[expert + 1] - first[expert], [&](int64_t i, int64_t * column, float ** to) {
            const route r = routes[first[expert] + i];
            *column = r.token*x->ne[1] + r.slot % x->ne[1];
            *to     = (float *) ((char *) dst->data + r.slot*dst->nb[1] + r.token*dst->nb[2]);
        });
    }
}

// ---- rows --------------------------------------------------------------------------------------------------------------------------

// dst[i12][i11][i10] = row ids[i12][i11][i10] of w[i11]. Only the lane of the row is decoded.
static void get_rows(worker & wk, ggml_tensor * dst) {
    const ggml_tensor * ids = dst->src[1];
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && dst->type == GGML_TYPE_F32 && dst->nb[0] == sizeof(float));
    GGML_ASSERT(wk.w->ne[2] == ids->ne[1] && wk.w->ne[3] == 1 && ids->ne[2] == 1);

    for (int64_t i = wk.params->ith; i < ggml_nelements(ids); i += wk.params->nth) {
        const int64_t i10 = i % ids->ne[0];
        const int64_t i11 = i / ids->ne[0];
        const int64_t row = *(const int32_t *) ((const char *) ids->data + i10*ids->nb[0] + i11*ids->nb[1]);
        GGML_ASSERT(row >= 0 && row < wk.w->ne[1]);

        wk.open(i11);
        char * to = (char *) dst->data + i10*dst->nb[1] + i11*dst->nb[2];
        const int64_t group = row/LANES;
        const int     lane  = (int) (row % LANES);
        for (int64_t slice = 0; slice < wk.decoder->view.n_slices; slice++) {
            wk.kernel.decode_lanes(wk.decoder, group, slice, lane, lane + 1);
            ggml_entropy_decoder_rows(wk.decoder, group, slice, lane, lane + 1, GGML_TYPE_F32, to, dst->nb[1]);
        }
    }
}

// ---- seam --------------------------------------------------------------------------------------------------------------------------

bool ggml_cpu_entropy_work_size(int n_threads, const ggml_tensor * op, size_t * size) {
    if (!is_mine(op)) {
        return false;
    }
    *size = work_layout(op, n_threads).end + 64;
    return true;
}

bool ggml_cpu_entropy_compute_forward(ggml_compute_params * params, ggml_tensor * op) {
    if (!is_mine(op)) {
        return false;
    }
    worker wk(params, op);
    switch (op->op) {
        case GGML_OP_MUL_MAT:    mul_mat   (wk, op); break;
        case GGML_OP_MUL_MAT_ID: mul_mat_id(wk, op); break;
        default:                 get_rows  (wk, op); break;
    }
    return true;
}
