// SPDX-License-Identifier: MIT
//
// Ops with entropy-coded weights on the CPU; see entropy-cpu.h. One file, since all ops share scratch, views and the way over row groups.
//
// MUL_MAT and MUL_MAT_ID in three steps: quantize the columns of src1 to int8, as ggml does for Q8_0 weights; then threads take groups of
// 16 rows from a counter; a group is decoded 256 columns at a time into 4 KB that stay in the L1 cache, and multiplied from there with up
// to 512 columns of src1 (for more it is decoded again). Sums are the 16 rows' own until the end, where the rows' scales come in.
//
// Weights with offsets stand in for F16 and Q4_1. The offsets are left out of the products and added at the end: with w = s*q + o,
// sum(w*x) = s*sum(q*x) + o*sum(x), where x are the quantized ones. And a column is quantized twice, first itself and then what the first
// time left over, which makes it nearly exact: 8 bits alone cost 0.5 % of perplexity against F16 (docs/decisions.md).
//
// With GGML_ENTROPY_PRODUCTS=stock a row group is decoded to the stock type that load mode decodes to, and multiplied by ggml's own product of
// that type: the sums of load mode, bit by bit, where load mode comes to that product, too.
//
// A weight in the device layout can come here, too: the scheduler copies one from a GPU for an op that the GPU does not do, and
// test-backend-ops copies all. Such slabs are decoded row by row, plainly.
//
// All scratch is in the graph's work buffer, but for a group's codes where products are stock. Payloads were validated when the model was
// loaded (llama-entropy.cpp). A file that is mapped can change after that: so a slab's header is checked again whenever it is opened, and
// all that follows is bounded by that copy.

#include "entropy-cpu.h"
#include "entropy-kernel.h"

#include "ggml-cpu.h"
#include "../../ggml-entropy-lanes.h"
#include "../../ggml-entropy-switch.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

static constexpr int ROWS  = GGML_ENTROPY_GROUP_ROWS;
static constexpr int UNIT  = GGML_ENTROPY_UNIT;
static constexpr int CHUNK = GGML_ENTROPY_MAX_UNITS; // units that are decoded at a time

// int8 columns that stand for one column, if the weights have offsets.
static constexpr int MAX_TERMS = 2;

// Bytes of a weight, or of a column's value, in any stock type that coded weights decode to, or that its products take.
static constexpr int MAX_WEIGHT = sizeof(ggml_fp16_t);
static_assert(MAX_WEIGHT*QK8_0 >= sizeof(block_q8_0) && MAX_WEIGHT*QK8_1 >= sizeof(block_q8_1) && MAX_WEIGHT <= MAX_TERMS, "scratch holds them");

// Columns of src1 that a decoded chunk is multiplied with: their parts of 256 values and their sums are 160 KB for each term.
static constexpr int COLUMN_BLOCK = 512;

static bool is_mine(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_GET_ROWS:
            return ggml_entropy_is_quantized(op->src[0]->type);
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

// Whose products: ours, or those of the stock type. Read once, at the first op or when the model loader asks whether the value is known.
struct product_choice {
    bool        is_stock;
    std::string refusal;
};

static const product_choice & chosen_products() {
    static const product_choice choice = [] {
        const ggml_entropy_switch products("GGML_ENTROPY_PRODUCTS", "own");
        const bool is_stock = products.value == "stock";
        return product_choice{ is_stock, is_stock || products.value == "own" ? "" : products.refusal("own or stock") };
    }();
    return choice;
}

static bool products_are_stock() {
    if (!chosen_products().refusal.empty()) {
        GGML_ABORT("%s", chosen_products().refusal.c_str());
    }
    return chosen_products().is_stock;
}

static const char * refusal() {
    const char * of_kernel = ggml_entropy_kernel_refusal();
    if (of_kernel != nullptr) {
        return of_kernel;
    }
    return chosen_products().refusal.empty() ? nullptr : chosen_products().refusal.c_str();
}

static const char * active_kernel() {
    return ggml_entropy_kernel_active().name;
}

static ggml_entropy_decode_t active_decoder() {
    return ggml_entropy_kernel_active().decode;
}

void * ggml_cpu_entropy_get_proc_address(const char * name) {
    if (std::strcmp(name, "ggml_backend_entropy_decoder") == 0) {
        return (void *) active_decoder;
    }
    if (std::strcmp(name, "ggml_backend_entropy_supports_op") == 0) {
        return (void *) supports_op;
    }
    if (std::strcmp(name, "ggml_backend_entropy_kernel") == 0) {
        return (void *) active_kernel;
    }
    if (std::strcmp(name, "ggml_backend_entropy_kernels") == 0) {
        return (void *) ggml_entropy_kernel_names;
    }
    if (std::strcmp(name, "ggml_backend_entropy_refusal") == 0) {
        return (void *) refusal;
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
    int64_t n_columns   = 0; // of src1
    size_t  values      = 0; // int8_t [MAX_TERMS][n_columns][ne0]; or columns for stock products
    size_t  scales      = 0; // float  [MAX_TERMS][n_columns][ne0/32]
    size_t  block_sums  = 0; // int32_t [MAX_TERMS][n_columns][ne0/32]
    size_t  totals      = 0; // float  [n_columns]: of the values of each
    size_t  first_route = 0; // int32_t [n_experts + 1]
    size_t  active      = 0; // int32_t [n_experts]: those with routes
    size_t  routes      = 0; // route [n_routes]
    size_t  threads     = 0;
    size_t  thread_size = 0;
    size_t  end         = 0;

    // in a thread's scratch
    size_t  units       = 0; // int8_t [CHUNK][UNIT]
    size_t  rows        = 0; // 16 rows, of codes or of a stock type; also a column of floats and one of block_q8_0 while columns are quantized
    size_t  index       = 0; // int32_t [n_block*MAX_TERMS]
    size_t  results     = 0; // float * [n_block]
    size_t  sums        = 0; // float [n_block*MAX_TERMS][ROWS]

    work_layout(const ggml_tensor * op, int n_threads) {
        const ggml_tensor * w = op->src[0];
        const ggml_tensor * x = op->src[1];
        int64_t n_block = 0;
        if (op->op != GGML_OP_GET_ROWS) {
            n_columns   = ggml_nrows(x);
            n_block     = std::min<int64_t>(COLUMN_BLOCK, op->op == GGML_OP_MUL_MAT_ID ? ggml_nelements(op->src[2]) : n_columns);
            scales      = part(values, MAX_TERMS*n_columns*x->ne[0]);
            block_sums  = part(scales,     MAX_TERMS*n_columns*(x->ne[0]/QK8_0)*sizeof(float));
            totals      = part(block_sums, MAX_TERMS*n_columns*(x->ne[0]/QK8_0)*sizeof(int32_t));
            threads     = part(totals, n_columns*sizeof(float));
            GGML_ASSERT(MAX_TERMS*n_columns <= INT32_MAX); // as their numbers are
        }
        if (op->op == GGML_OP_MUL_MAT_ID) {
            first_route = threads;
            active      = part(first_route, sizeof(int32_t)*(w->ne[2] + 1));
            routes      = part(active,      sizeof(int32_t)*w->ne[2]);
            threads     = part(routes,      sizeof(route)*ggml_nelements(op->src[2]));
        }
        rows        = part(units,   CHUNK*UNIT);
        index       = part(rows,    MAX_WEIGHT*ROWS*w->ne[0]);
        results     = part(index,   n_block*MAX_TERMS*sizeof(int32_t));
        sums        = part(results, n_block*sizeof(float *));
        thread_size = part(sums,    n_block*MAX_TERMS*ROWS*sizeof(float));
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
    work_layout                 layout;
    const ggml_entropy_kernel & kernel;
    int                         n_terms  = MAX_TERMS;
    ggml_type                   stock    = GGML_TYPE_COUNT; // the type whose products are asked for
    int64_t                     i_slab   = -1; // that is open
    bool                        is_lanes = false;
    ggml_entropy_view           view;          // of a slab in planes
    ggml_entropy_lanes_header   lanes;         // of one in lanes

    worker(ggml_compute_params * params, const ggml_tensor * op) :
            params(params), w(op->src[0]), x(op->src[1]), layout(op, params->nth),
            kernel(params->use_ref ? *ggml_entropy_kernel_find("ref") : ggml_entropy_kernel_active()) {
        // aligned here: the caller's work buffer may start anywhere
        GGML_ASSERT(params->wsize >= layout.end + 64);
    }

    char * base() const {
        return (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    }

    template <typename T>
    T * shared(size_t offset) const {
        return (T *) (base() + offset);
    }

    template <typename T>
    T * own(size_t offset) const {
        return (T *) (base() + layout.threads + layout.thread_size*params->ith + offset);
    }

    const char * slab(int64_t i) const {
        return (const char *) w->data + i*w->nb[2];
    }

    // Weights of a model in host memory are planes: they may be a mapped file, which does not get to choose another layout later. Lanes
    // come in the scheduler's copies, which nobody else writes.
    bool may_be_lanes() const {
        return w->buffer == nullptr || ggml_backend_buffer_get_usage(w->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS
            || !ggml_backend_buffer_is_host(w->buffer);
    }

    void open(int64_t i) {
        if (i_slab == i) {
            return;
        }
        i_slab   = i;
        is_lanes = may_be_lanes() && ggml_entropy_is_lanes(slab(i));
        ggml_entropy_status status = GGML_ENTROPY_OK;
        if (is_lanes) {
            std::memcpy(&lanes, slab(i), sizeof(lanes));
            status = has_stock_products() ? GGML_ENTROPY_BAD_MODE : check(lanes.n_cols, lanes.n_rows, lanes.kind, lanes.offset_mode);
        } else {
            status = ggml_entropy_open(slab(i), w->nb[2], &view);
            if (status == GGML_ENTROPY_OK) {
                status = check(view.header.n_cols, view.header.n_rows, view.header.kind, view.header.offset_mode);
            }
            if (status == GGML_ENTROPY_OK && has_stock_products() && ggml_entropy_plain_type(&view.header) != stock) {
                status = GGML_ENTROPY_BAD_MODE;
            }
            view.decode = kernel.decode;
        }
        if (status != GGML_ENTROPY_OK) {
            GGML_ABORT("tensor '%s' of type %s: %s: the file was changed after the model was loaded: load it again",
                w->name, ggml_type_name(w->type), ggml_entropy_status_str(status));
        }
    }

    // A header against the tensor, and against the terms that columns were quantized to.
    ggml_entropy_status check(int64_t n_cols, int64_t n_rows, int kind, int offset_mode) const {
        if (n_cols != w->ne[0] || n_rows != w->ne[1] || (kind == GGML_ENTROPY_KIND_EQ8) != (w->type == GGML_TYPE_EQ8)) {
            return GGML_ENTROPY_BAD_SHAPE;
        }
        return offset_mode != GGML_ENTROPY_OFFSET_NONE && n_terms != MAX_TERMS ? GGML_ENTROPY_BAD_MODE : GGML_ENTROPY_OK;
    }

    bool has_stock_products() const {
        return stock != GGML_TYPE_COUNT;
    }

    // Does the open slab have offsets?
    bool has_offset() const {
        return (is_lanes ? lanes.offset_mode : view.header.offset_mode) != GGML_ENTROPY_OFFSET_NONE;
    }

    // Scales and offsets of n rows of the open slab from `row` on. In place: calls of ggml-base for each row would be a twentieth of the
    // time of a narrow matrix.
    void grid_of(int64_t row, int n, float * scales, float * offsets) const {
        for (int i = 0; i < n; i++) {
            if (is_lanes) {
                ggml_entropy_lanes_row_grid(slab(i_slab), row + i, &scales[i], &offsets[i]);
                continue;
            }
            scales[i]  = GGML_FP16_TO_FP32(view.scales != nullptr ? view.scales[row + i] : view.header.scale);
            offsets[i] = view.offsets != nullptr ? view.offsets[row + i] : view.header.offset;
        }
    }

    int n_rows(int64_t group) const {
        return (int) std::min<int64_t>(ROWS, w->ne[1] - group*ROWS);
    }
};

// The units of a row group of the open slab, a chunk at a time.
struct group_reader {
    worker            & wk;
    ggml_entropy_stream stream;

    group_reader(worker & wk, int64_t group) : wk(wk) {
        if (!wk.is_lanes) {
            ggml_entropy_stream_open(&wk.view, group, &stream);
            return;
        }
        for (int row = 0; row < ROWS; row++) {
            int8_t * codes = wk.own<int8_t>(wk.layout.rows) + row*wk.w->ne[0];
            if (row < wk.n_rows(group)) {
                ggml_entropy_lanes_decode_row(wk.slab(wk.i_slab), group*ROWS + row, codes);
            } else {
                std::memset(codes, 0, wk.w->ne[0]);
            }
        }
    }

    // The units from column `first` on; chunks are read in order.
    const int8_t * read(int64_t first, int n_units) {
        int8_t * units = wk.own<int8_t>(wk.layout.units);
        if (!wk.is_lanes) {
            wk.kernel.decode(&wk.view.header.code, &stream, n_units, units);
            return units;
        }
        for (int u = 0; u < n_units; u++) {
            for (int row = 0; row < ROWS; row++) {
                std::memcpy(units + u*UNIT + 4*row, wk.own<int8_t>(wk.layout.rows) + row*wk.w->ne[0] + first + 4*u, 4);
            }
        }
        return units;
    }

    // f(units, number of units, first column) for the whole group
    template <typename F>
    void each_chunk(const F & f) {
        for (int64_t first = 0; first < wk.w->ne[0]; first += CHUNK*GGML_ENTROPY_UNIT_COLS) {
            const int n_units = (int) std::min<int64_t>(CHUNK, (wk.w->ne[0] - first)/GGML_ENTROPY_UNIT_COLS);
            f(read(first, n_units), n_units, first);
        }
    }
};

// ---- matrix multiplication ---------------------------------------------------------------------------------------------------------

// What a Q8_0 column leaves over of the floats it was made from.
static void subtract(const float * from, const block_q8_0 * x, int64_t n_blocks, float * rest) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const float d = GGML_FP16_TO_FP32(x[i].d);
        for (int j = 0; j < QK8_0; j++) {
            rest[i*QK8_0 + j] = from[i*QK8_0 + j] - d*(float) x[i].qs[j];
        }
    }
}

// A column as blocks into values, scales and sums of values. Returns the sum of what they stand for.
static float split_blocks(const block_q8_0 * from, int64_t n_blocks, int8_t * values, float * scales, int32_t * sums) {
    float total = 0.0f;
    for (int64_t i = 0; i < n_blocks; i++) {
        scales[i] = GGML_FP16_TO_FP32(from[i].d);
        std::memcpy(values + i*QK8_0, from[i].qs, QK8_0);
        int sum = 0;
        for (int j = 0; j < QK8_0; j++) {
            sum += from[i].qs[j];
        }
        sums[i] = sum;
        total  += scales[i]*(float) sum;
    }
    return total;
}

// Columns of src1, in the order of i11, i12, i13, to int8; threads share them.
static void quantize_columns(worker & wk) {
    const ggml_from_float_t quantize = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
    const ggml_tensor * x = wk.x;
    const int64_t n_cols   = x->ne[0];
    const int64_t n_blocks = n_cols/QK8_0;
    float      * rest   = wk.own<float>(wk.layout.rows);
    block_q8_0 * blocks = wk.own<block_q8_0>(wk.layout.rows + n_cols*sizeof(float));
    static_assert(sizeof(float) + 2 <= ROWS, "the scratch holds a column of floats and one of blocks");
    for (int64_t c = wk.params->ith; c < wk.layout.n_columns; c += wk.params->nth) {
        const int64_t i11 = c % x->ne[1];
        const int64_t i12 = c / x->ne[1] % x->ne[2];
        const int64_t i13 = c / x->ne[1] / x->ne[2];
        const float * from = (const float *) ((const char *) x->data + i11*x->nb[1] + i12*x->nb[2] + i13*x->nb[3]);
        if (wk.has_stock_products()) {
            const ggml_type type = ggml_get_type_traits_cpu(wk.stock)->vec_dot_type;
            ggml_get_type_traits_cpu(type)->from_float(from, wk.shared<char>(wk.layout.values) + c*ggml_row_size(type, n_cols), n_cols);
            continue;
        }
        float total = 0.0f;
        for (int term = 0; term < wk.n_terms; term++) {
            const int64_t at = term*wk.layout.n_columns + c;
            quantize(from, blocks, n_cols);
            total += split_blocks(
                blocks, n_blocks, wk.shared<int8_t>(wk.layout.values) + at*n_cols, wk.shared<float>(wk.layout.scales) + at*n_blocks,
                wk.shared<int32_t>(wk.layout.block_sums) + at*n_blocks);
            if (term + 1 < wk.n_terms) {
                subtract(from, blocks, n_blocks, rest);
                from = rest;
            }
        }
        wk.shared<float>(wk.layout.totals)[c] = total;
    }
}

// The products of a row group of the open slab with n columns of src1: where(i, &column, &result) tells the number of column i, and where
// its results, one for each row of the matrix, go.
template <typename Where>
static void multiply_group_own(worker & wk, int64_t group, int64_t n, const Where & where) {
    const ggml_entropy_columns columns = {
        wk.shared<int8_t>(wk.layout.values), wk.shared<float>(wk.layout.scales), wk.shared<int32_t>(wk.layout.block_sums), wk.x->ne[0]
    };
    const int n_rows = wk.n_rows(group);
    int32_t * index   = wk.own<int32_t>(wk.layout.index);
    float  ** results = wk.own<float *>(wk.layout.results);
    auto    * sums    = wk.own<float[ROWS]>(wk.layout.sums);
    for (int64_t i0 = 0; i0 < n; i0 += COLUMN_BLOCK) {
        const int n_block = (int) std::min<int64_t>(COLUMN_BLOCK, n - i0);
        for (int i = 0; i < n_block; i++) {
            int64_t column;
            where(i0 + i, &column, &results[i]);
            for (int term = 0; term < wk.n_terms; term++) {
                index[term*n_block + i] = (int32_t) (term*wk.layout.n_columns + column);
            }
        }
        std::memset(sums, 0, n_block*wk.n_terms*sizeof(sums[0]));
        group_reader(wk, group).each_chunk([&](const int8_t * units, int n_units, int64_t first) {
            wk.kernel.multiply(units, n_units, first, columns, index, n_block*wk.n_terms, sums);
        });
        float scale [ROWS];
        float offset[ROWS];
        wk.grid_of(group*ROWS, n_rows, scale, offset);
        for (int i = 0; i < n_block; i++) {
            float * to = results[i] + group*ROWS;
            for (int row = 0; row < n_rows; row++) {
                to[row] = scale[row]*sums[i][row];
            }
            if (wk.n_terms > 1) {
                const float total = wk.shared<float>(wk.layout.totals)[index[i]];
                for (int row = 0; row < n_rows; row++) {
                    to[row] += scale[row]*sums[n_block + i][row] + offset[row]*total;
                }
            }
        }
    }
}

// The same by the stock type's own product, one row and one column at a time.
template <typename Where>
static void multiply_group_stock(worker & wk, int64_t group, int64_t n, const Where & where) {
    const auto * traits = ggml_get_type_traits_cpu(wk.stock);
    const int64_t n_cols      = wk.w->ne[0];
    const size_t  row_size    = ggml_row_size(wk.stock, n_cols);
    const size_t  column_size = ggml_row_size(traits->vec_dot_type, n_cols);
    const char * columns = wk.shared<char>(wk.layout.values);
    char       * rows    = wk.own<char>(wk.layout.rows);
    GGML_ASSERT(ggml_entropy_decode_groups_plain(&wk.view, group, group + 1, wk.stock, rows) == GGML_ENTROPY_OK);
    for (int64_t i = 0; i < n; i++) {
        int64_t column;
        float * result;
        where(i, &column, &result);
        for (int row = 0; row < wk.n_rows(group); row++) {
            traits->vec_dot((int) n_cols, result + group*ROWS + row, 0, rows + row*row_size, 0, columns + column*column_size, 0, 1);
        }
    }
}

template <typename Where>
static void multiply_group(worker & wk, int64_t group, int64_t n, const Where & where) {
    if (wk.has_stock_products()) {
        multiply_group_stock(wk, group, n, where);
    } else {
        multiply_group_own(wk, group, n, where);
    }
}

// Whether the weights have offsets (all slabs do or none) is told by a slab that the op uses: of experts that are not used not even the
// header need be there.
static void choose_terms(worker & wk, const ggml_tensor * ids) {
    const int64_t i_slab = ids == nullptr || ggml_nelements(ids) == 0 ? 0 : *(const int32_t *) ids->data;
    GGML_ASSERT(i_slab >= 0 && i_slab < wk.w->ne[2]);
    wk.open(i_slab);
    wk.n_terms = wk.has_offset() ? MAX_TERMS : 1;
    if (products_are_stock() && !wk.is_lanes) {
        wk.stock = ggml_entropy_plain_type(&wk.view.header);
    }
}

// Every thread begins with the unit of its own number; the counter hands out the others.
static void start_counter(const worker & wk) {
    if (wk.params->ith == 0) {
        ggml_threadpool_chunk_set(wk.params->threadpool, wk.params->nth);
    }
    ggml_barrier(wk.params->threadpool);
}

static int64_t next_item(const worker & wk) {
    return ggml_threadpool_chunk_add(wk.params->threadpool, 1);
}

// dst[i13][i12][i11][row] = w[i12 / r2][row] . x[i13][i12][i11]
static void mul_mat(worker & wk, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[1];
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    GGML_ASSERT(wk.w->ne[3] == 1 && x->ne[2] % wk.w->ne[2] == 0);

    choose_terms(wk, nullptr);
    quantize_columns(wk);
    start_counter(wk);

    const int64_t n_slabs  = wk.w->ne[2];
    const int64_t n_groups = (wk.w->ne[1] + ROWS - 1)/ROWS;
    const int64_t n_i11    = x->ne[1];
    const int64_t n_i12    = x->ne[2]/n_slabs; // planes of src1 that share a slab
    for (int64_t item = wk.params->ith; item < n_slabs*n_groups; item = next_item(wk)) {
        const int64_t i_slab = item/n_groups;
        wk.open(i_slab);
        multiply_group(wk, item % n_groups, n_i11*n_i12*x->ne[3], [&](int64_t i, int64_t * column, float ** result) {
            const int64_t i11 = i % n_i11;
            const int64_t i12 = i / n_i11 % n_i12 + i_slab*n_i12;
            const int64_t i13 = i / n_i11 / n_i12;
            *column = (i13*x->ne[2] + i12)*n_i11 + i11;
            *result = (float *) ((char *) dst->data + i11*dst->nb[1] + i12*dst->nb[2] + i13*dst->nb[3]);
        });
    }
}

// Sort the columns by expert; active lists the experts that have any and ends with -1 if some have none. One thread does it.
static void sort_routes(const worker & wk, const ggml_tensor * ids) {
    const int32_t n_experts = (int32_t) wk.w->ne[2];
    int32_t * first  = wk.shared<int32_t>(wk.layout.first_route);
    int32_t * active = wk.shared<int32_t>(wk.layout.active);
    route   * routes = wk.shared<route>(wk.layout.routes);
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

    choose_terms(wk, ids);
    quantize_columns(wk);
    if (wk.params->ith == 0) {
        sort_routes(wk, ids);
    }
    start_counter(wk);

    const int32_t * first  = wk.shared<int32_t>(wk.layout.first_route);
    const int32_t * active = wk.shared<int32_t>(wk.layout.active);
    const route   * routes = wk.shared<route>(wk.layout.routes);
    const int64_t n_experts = wk.w->ne[2];
    const int64_t n_active  = std::find(active, active + n_experts, -1) - active;
    const int64_t n_groups  = (wk.w->ne[1] + ROWS - 1)/ROWS;
    for (int64_t item = wk.params->ith; item < n_active*n_groups; item = next_item(wk)) {
        const int32_t expert = active[item/n_groups];
        wk.open(expert);
        multiply_group(wk, item % n_groups, first[expert + 1] - first[expert], [&](int64_t i, int64_t * column, float ** result) {
            const route r = routes[first[expert] + i];
            *column = r.token*x->ne[1] + r.slot % x->ne[1];
            *result = (float *) ((char *) dst->data + r.slot*dst->nb[1] + r.token*dst->nb[2]);
        });
    }
}

// ---- rows --------------------------------------------------------------------------------------------------------------------------

// dst[i12][i11][i10] = row ids[i12][i11][i10] of w[i11]. The whole group of the row is decoded.
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
        float * to = (float *) ((char *) dst->data + i10*dst->nb[1] + i11*dst->nb[2]);
        float scale;
        float offset;
        wk.grid_of(row, 1, &scale, &offset);
        group_reader(wk, row/ROWS).each_chunk([&](const int8_t * units, int n_units, int64_t first) {
            for (int u = 0; u < n_units; u++) {
                for (int j = 0; j < 4; j++) {
                    to[first + 4*u + j] = scale*(float) units[u*UNIT + row%ROWS*4 + j] + offset;
                }
            }
        });
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
