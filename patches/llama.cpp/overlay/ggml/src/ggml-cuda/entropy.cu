// SPDX-License-Identifier: MIT
//
// Ops with entropy-coded weights on CUDA devices: what the host does. The kernels are in entropy/. One file, since all ops share the rules
// of which path a batch takes.
//
// MUL_MAT with up to 8 columns and MUL_MAT_ID with up to 8 tokens decode inside of the mat-vec kernel. Larger batches decode once into a
// buffer of a stock type and go on as that: MUL_MAT into F16, by the path that F16 weights take (bit-exact weights, whatever their offsets:
// the model loader refuses those beyond F16); MUL_MAT_ID into Q8_0 or Q4_0 without offsets, by MMQ, which is the one path that sorts
// columns by expert without asking the device; a small kernel adds offset * sum(x) afterwards. The buffer is bounded
// (entropy_tuning::scratch_size): matrices beyond go in chunks of rows.
//
// Switches, for measurements and doubts (ggml-entropy-switch.h): GGML_ENTROPY_CUDA_COLUMNS=0..8, the largest batch of the mat-vec kernel
// (0: never), GGML_ENTROPY_CUDA_ROWS=f16|blocks, what MUL_MAT decodes to for larger ones (blocks: Q8_0 or Q4_0, as MUL_MAT_ID), and, for
// tests, GGML_ENTROPY_CUDA_POISON=0|1, whether the scratch for decoded rows holds NaNs before it is used.
//
// Weights in a device's memory are in the device layout (ggml-entropy-lanes.h), which the model loader makes while it uploads them; in host
// memory they are in the layout of the file. So the scheduler may not copy weights from host memory to a device for a large batch, as it
// does with stock types (op offload): supports_op says no for them.
//
// The host knows type, ne and nb of a weight and nothing of its payload: reading a header would mean waiting. So kernels look for
// themselves what tile_cols is and whether there are offsets.

#include "entropy.cuh"

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "entropy/entropy-launch.cuh"
#include "mmq.cuh"
#include "../ggml-entropy-switch.h"

#include <cstring>
#include <mutex>
#include <string>

static const entropy_tuning & tuning_of(int device) {
    static const std::vector<entropy_tuning> tunings = []() {
        std::vector<entropy_tuning> all;
        for (int i = 0; i < ggml_cuda_info().device_count; i++) {
            all.push_back(entropy_tuning_of(ggml_cuda_info().devices[i].cc, ggml_cuda_info().devices[i].smpbo, ggml_cuda_info().devices[i].nsm));
        }
        return all;
    }();
    return tunings[device];
}

// The switches, and the reason why one is refused.
struct entropy_switches {
    int64_t     max_columns = 0;
    bool        in_blocks   = false;
    bool        is_poisoned = false;
    std::string refusal;

    entropy_switches() {
        const ggml_entropy_switch columns("GGML_ENTROPY_CUDA_COLUMNS", "8");
        const ggml_entropy_switch rows   ("GGML_ENTROPY_CUDA_ROWS",    "f16");
        const ggml_entropy_switch poison ("GGML_ENTROPY_CUDA_POISON",  "0");
        static_assert(ENTROPY_MAX_COLUMNS == 8, "the default and the largest value");
        if (columns.value.size() != 1 || columns.value[0] < '0' || columns.value[0] > '8') {
            refusal = columns.refusal("a number from 0 to 8");
        } else if (rows.value != "f16" && rows.value != "blocks") {
            refusal = rows.refusal("f16 or blocks");
        } else if (poison.value != "0" && poison.value != "1") {
            refusal = poison.refusal("0 or 1");
        } else {
            max_columns = columns.value[0] - '0';
            in_blocks   = rows.value == "blocks";
            is_poisoned = poison.value == "1";
        }
    }

    static const entropy_switches & read() {
        static const entropy_switches switches;
        return switches;
    }
};

static const char * switch_refusal() {
    const std::string & refusal = entropy_switches::read().refusal;
    return refusal.empty() ? nullptr : refusal.c_str();
}

static const entropy_switches & switches() {
    if (switch_refusal() != nullptr) {
        GGML_ABORT("%s", switch_refusal());
    }
    return entropy_switches::read();
}

static ggml_type blocks_of(ggml_type type) {
    return type == GGML_TYPE_EQ8 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0;
}

// Launches on a stream. A kernel that wants more than 48 KB of shared memory has to be told so once per device.
struct stream_launcher {
    cudaStream_t stream;

    template <typename Args>
    void operator()(void (*kernel)(Args), dim3 grid, int n_threads, int n_shared, const Args & args) const {
        allow_shared(kernel);
        kernel<<<grid, n_threads, n_shared, stream>>>(args);
        CUDA_CHECK(cudaGetLastError());
    }

    // As upstream's kernels that wait for themselves; GGML_CUDA_PDL=0 turns it off.
    template <typename Args>
    void early(void (*kernel)(Args), dim3 grid, int n_threads, int n_shared, const Args & args) const {
        allow_shared(kernel);
        ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3((uint32_t) n_threads), n_shared, stream), args);
    }

    template <typename Args>
    static void allow_shared(void (*kernel)(Args)) {
        static std::mutex mutex;
        static std::vector<std::pair<const void *, int>> allowed;
        const int device = ggml_cuda_get_device();
        const std::pair<const void *, int> key((const void *) kernel, device);
        std::lock_guard<std::mutex> lock(mutex);
        if (std::find(allowed.begin(), allowed.end(), key) == allowed.end()) {
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) ggml_cuda_info().devices[device].smpbo));
            allowed.push_back(key);
        }
    }
};

static entropy_source source_of(const ggml_tensor * x) {
    return { (const float *) x->data, x->ne[1], x->ne[2], (int64_t) (x->nb[1]/sizeof(float)), (int64_t) (x->nb[2]/sizeof(float)),
        (int64_t) (x->nb[3]/sizeof(float)) };
}

// ---- up to 8 columns ---------------------------------------------------------------------------------------------------------------

// One op, or two whose weights have the same type and which have all else but the weights in common.
template <ggml_type TYPE>
static void mat_vec(ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_tensor * second) {
    const ggml_tensor * x   = dst->src[1];
    const ggml_tensor * ids = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : nullptr;
    const stream_launcher launcher = { ctx.stream() };
    ggml_cuda_pool_alloc<entropy_block> blocks(ctx.pool(), entropy_columns::n_blocks(ggml_nrows(x), x->ne[0]));

    entropy_mat_vec_args args = {};
    int64_t n_rows[2] = { 0, 0 };
    for (int i = 0; i < 2; i++) {
        const ggml_tensor * op = i == 1 && second != nullptr ? second : dst;
        const ggml_tensor * w  = op->src[0];
        args.payload[i]     = (const uint8_t *) w->data;
        args.slab_stride[i] = (int64_t) w->nb[2];
        args.y[i]           = (float *) op->data;
        args.y1[i]          = (int64_t) (op->nb[1]/sizeof(float));
        args.y2[i]          = (int64_t) (op->nb[2]/sizeof(float));
        args.y3[i]          = (int64_t) (op->nb[3]/sizeof(float));
        if (ids != nullptr) { // planes are slots and tokens
            args.y3[i] = args.y2[i];
            args.y2[i] = args.y1[i];
        }
        if (i == 0 || second != nullptr) {
            n_rows[i] = w->ne[1];
        }
    }
    const ggml_tensor * w = dst->src[0];
    args.columns = { blocks.get(), ggml_nrows(x), (int) x->ne[0] };
    entropy_routes routes = {};
    if (ids != nullptr) {
        routes = {
            (const int32_t *) ids->data, (int64_t) (ids->nb[0]/sizeof(int32_t)), (int64_t) (ids->nb[1]/sizeof(int32_t)),
            (int) ids->ne[0], (int) w->ne[2],
        };
    }
    entropy_launch_quantize<TYPE>(launcher, {
        { args.payload[0], args.payload[1] }, { args.slab_stride[0], args.slab_stride[1] }, routes, source_of(x), args.columns,
    });

    args.n1              = x->ne[1];
    args.n2              = x->ne[2];
    args.planes_per_slab = 1;
    if (ids != nullptr) {
        args.ids       = routes.ids;
        args.ids_s0    = routes.s0;
        args.ids_s1    = routes.s1;
        args.n_experts = routes.n_experts;
        entropy_launch_mat_vec<TYPE>(launcher, args, 1, n_rows, ids->ne[0], ids->ne[1], tuning_of(ctx.device));
    } else {
        args.planes_per_slab = (int) (x->ne[2]/w->ne[2]);
        entropy_launch_mat_vec<TYPE>(launcher, args, (int) x->ne[1], n_rows, x->ne[2], x->ne[3], tuning_of(ctx.device));
    }
}

static void mat_vec(ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_tensor * second = nullptr) {
    if (dst->src[0]->type == GGML_TYPE_EQ8) {
        mat_vec<GGML_TYPE_EQ8>(ctx, dst, second);
    } else {
        mat_vec<GGML_TYPE_EQ4>(ctx, dst, second);
    }
}

static bool is_small(const ggml_tensor * op) {
    const int64_t n_columns = op->op == GGML_OP_MUL_MAT_ID ? op->src[2]->ne[1] : op->src[1]->ne[1];
    return n_columns <= switches().max_columns;
}

// ---- batches -----------------------------------------------------------------------------------------------------------------------

// Rows of a stock type in the pool, as a tensor that the stock paths take. Its last row may be read on to a multiple of 512 columns, and so
// may the last row of a slab: into the next one, which is decoded only if it is used. What MMQ reads there it multiplies by zeros; so it
// must not be what gives a NaN.
struct decoded_rows {
    ggml_cuda_pool_alloc<uint8_t> memory;
    ggml_tensor tensor;

    decoded_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * w, ggml_type plain, int64_t n_rows, int64_t n_slabs) : memory(ctx.pool()) {
        tensor        = *w;
        tensor.type   = plain;
        tensor.ne[1]  = n_rows;
        tensor.ne[2]  = n_slabs;
        tensor.nb[0]  = ggml_type_size(plain);
        tensor.nb[1]  = ggml_row_size(plain, w->ne[0]);
        tensor.nb[2]  = tensor.nb[1]*n_rows;
        tensor.nb[3]  = tensor.nb[2]*n_slabs;
        tensor.op     = GGML_OP_NONE;
        tensor.view_src = nullptr;
        const size_t n_bytes   = tensor.nb[3];
        const size_t n_padding = ggml_row_size(plain, MATRIX_ROW_PADDING);
        tensor.data = memory.alloc(n_bytes + n_padding);
        if (switches().is_poisoned) {
            CUDA_CHECK(cudaMemsetAsync(tensor.data, 0xFF, n_bytes, ctx.stream())); // NaN as f16
        }
        const size_t n_kept = n_slabs > 1 && w->ne[0] % MATRIX_ROW_PADDING != 0 ? 0 : n_bytes;
        CUDA_CHECK(cudaMemsetAsync((uint8_t *) tensor.data + n_kept, 0, n_bytes + n_padding - n_kept, ctx.stream()));
    }
};

// Rows that go into the scratch at a time, a multiple of 128 as MMQ likes it.
static int64_t rows_of_chunk(ggml_backend_cuda_context & ctx, size_t row_size, int64_t n_rows, int64_t n_slabs) {
    const int64_t n = (int64_t) (tuning_of(ctx.device).scratch_size/(row_size*n_slabs))/128*128;
    return std::min(n_rows, std::max<int64_t>(n, 128));
}

static void decode_rows(
        ggml_backend_cuda_context & ctx, const ggml_tensor * w, int64_t i_slab, const int32_t * n_routes, int64_t row0, const ggml_tensor & to) {
    const entropy_rows_args args = {
        (const uint8_t *) w->data + i_slab*w->nb[2], (int64_t) w->nb[2], (int) (row0/ENTROPY_LANES),
        (uint8_t *) to.data, (int64_t) to.nb[1], (int64_t) to.nb[2], n_routes,
    };
    const bool known = entropy_launch_decode(
        stream_launcher{ ctx.stream() }, w->type, to.type, args, entropy_ceil_div(to.ne[1], ENTROPY_LANES), w->ne[0], w->ne[1], to.ne[2],
        tuning_of(ctx.device));
    GGML_ASSERT(known);
}

static entropy_offsets_args offsets_of(const ggml_tensor * w, const ggml_tensor * x, ggml_tensor * dst) {
    entropy_offsets_args args = {};
    args.payload         = (const uint8_t *) w->data;
    args.slab_stride     = (int64_t) w->nb[2];
    args.source          = source_of(x);
    args.y               = (float *) dst->data;
    args.y1              = (int64_t) (dst->nb[1]/sizeof(float));
    args.y2              = (int64_t) (dst->nb[2]/sizeof(float));
    args.y3              = (int64_t) (dst->nb[3]/sizeof(float));
    args.n_cols          = (int) x->ne[0];
    args.planes_per_slab = 1;
    return args;
}

// A chunk of rows gives a part of every column of dst. The stock paths want a contiguous result, so a part is made beside dst and copied.
static void mul_mat_batch(
        ggml_backend_cuda_context & ctx, const ggml_tensor * w, const ggml_tensor * x, ggml_tensor * dst, ggml_cuda_mul_mat_t stock) {
    cudaStream_t stream = ctx.stream();
    const int64_t n_planes = x->ne[2]/w->ne[2];
    const ggml_type plain  = switches().in_blocks ? blocks_of(w->type) : GGML_TYPE_F16;
    const int64_t n_rows   = rows_of_chunk(ctx, ggml_row_size(plain, w->ne[0]), w->ne[1], 1);
    const bool    whole    = n_rows == w->ne[1];
    decoded_rows rows(ctx, w, plain, n_rows, 1);
    ggml_cuda_pool_alloc<float> part(ctx.pool());
    if (!whole) {
        part.alloc(n_rows*x->ne[1]);
    }
    for (int64_t i_slab = 0; i_slab < w->ne[2]; i_slab++) {
        for (int64_t row0 = 0; row0 < w->ne[1]; row0 += n_rows) {
            ggml_tensor chunk = rows.tensor;
            chunk.ne[1] = std::min(n_rows, w->ne[1] - row0);
            chunk.nb[2] = chunk.nb[3] = chunk.nb[1]*chunk.ne[1];
            decode_rows(ctx, w, i_slab, nullptr, row0, chunk);
            for (int64_t i = 0; i < n_planes*x->ne[3]; i++) {
                const int64_t i2 = i_slab*n_planes + i%n_planes;
                const int64_t i3 = i/n_planes;
                ggml_tensor from = *x;
                from.data  = (char *) x->data + i2*x->nb[2] + i3*x->nb[3];
                from.ne[2] = from.ne[3] = 1;
                from.nb[2] = from.nb[3] = from.nb[1]*from.ne[1];
                ggml_tensor to = *dst;
                char * result = (char *) dst->data + i2*dst->nb[2] + i3*dst->nb[3];
                to.ne[0] = chunk.ne[1];
                to.ne[2] = to.ne[3] = 1;
                to.nb[1] = to.ne[0]*sizeof(float);
                to.nb[2] = to.nb[3] = to.nb[1]*to.ne[1];
                to.data  = whole ? result : (void *) part.get();
                to.src[0] = &chunk;
                to.src[1] = &from;
                stock(ctx, &chunk, &from, &to);
                if (!whole) {
                    CUDA_CHECK(cudaMemcpy2DAsync(result + row0*sizeof(float), dst->nb[1], to.data, to.nb[1], to.nb[1], to.ne[1],
                        cudaMemcpyDeviceToDevice, stream));
                }
            }
        }
    }
    if (plain != GGML_TYPE_F16) {
        entropy_offsets_args args = offsets_of(w, x, dst);
        args.planes_per_slab = (int) n_planes;
        entropy_launch_add_offsets(stream_launcher{ stream }, args, dim3((uint32_t) x->ne[1], (uint32_t) x->ne[2], (uint32_t) x->ne[3]));
    }
}

static void mul_mat_id_batch(ggml_backend_cuda_context & ctx, const ggml_tensor * w, const ggml_tensor * x, const ggml_tensor * ids,
        ggml_tensor * dst) {
    cudaStream_t stream = ctx.stream();
    const ggml_type plain   = blocks_of(w->type);
    const int64_t   n_slabs = w->ne[2];
    const int64_t   n_rows  = rows_of_chunk(ctx, ggml_row_size(plain, w->ne[0]), w->ne[1], n_slabs);
    const int64_t   ids_s0  = ids->nb[0]/sizeof(int32_t);
    const int64_t   ids_s1  = ids->nb[1]/sizeof(int32_t);

    ggml_cuda_pool_alloc<int32_t> n_routes(ctx.pool(), n_slabs);
    entropy_count_routes<<<1, 256, 0, stream>>>((const int32_t *) ids->data, ids_s0, ids_s1, (int) ids->ne[0], (int) ids->ne[1],
        (int) n_slabs, n_routes.get());
    CUDA_CHECK(cudaGetLastError());

    decoded_rows rows(ctx, w, plain, n_rows, n_slabs);
    for (int64_t row0 = 0; row0 < w->ne[1]; row0 += n_rows) {
        ggml_tensor chunk = rows.tensor;
        chunk.ne[1] = std::min(n_rows, w->ne[1] - row0);
        chunk.nb[2] = chunk.nb[1]*chunk.ne[1]; // MMQ wants the slabs one behind the other
        chunk.nb[3] = chunk.nb[2]*n_slabs;
        decode_rows(ctx, w, 0, n_routes.get(), row0, chunk);
        ggml_tensor to = *dst;
        to.ne[0]  = chunk.ne[1];
        to.data   = (char *) dst->data + row0*sizeof(float);
        to.src[0] = &chunk;
        ggml_cuda_mul_mat_q(ctx, &chunk, x, ids, &to);
    }
    entropy_offsets_args args = offsets_of(w, x, dst);
    args.ids       = (const int32_t *) ids->data;
    args.ids_s0    = ids_s0;
    args.ids_s1    = ids_s1;
    args.n_experts = (int) n_slabs;
    entropy_launch_add_offsets(stream_launcher{ stream }, args, dim3(1, (uint32_t) ids->ne[0], (uint32_t) ids->ne[1]));
}

// ---- ops ---------------------------------------------------------------------------------------------------------------------------

bool ggml_cuda_entropy_mul_mat(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst, ggml_cuda_mul_mat_t stock) {
    if (!ggml_entropy_is_quantized(src0->type)) {
        return false;
    }
    GGML_ASSERT(dst->src[0] == src0 && dst->src[1] == src1);
    if (is_small(dst)) {
        mat_vec(ctx, dst);
    } else {
        mul_mat_batch(ctx, src0, src1, dst, stock);
    }
    return true;
}

bool ggml_cuda_entropy_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!ggml_entropy_is_quantized(dst->src[0]->type)) {
        return false;
    }
    if (is_small(dst)) {
        mat_vec(ctx, dst);
    } else {
        mul_mat_id_batch(ctx, dst->src[0], dst->src[1], dst->src[2], dst);
    }
    return true;
}

static bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a0 = (const char *) a->data;
    const char * b0 = (const char *) b->data;
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

bool ggml_cuda_entropy_mul_mat_pair(ggml_backend_cuda_context & ctx, ggml_tensor * first, ggml_tensor * second) {
    if ((first->op != GGML_OP_MUL_MAT && first->op != GGML_OP_MUL_MAT_ID) || second->op != first->op) {
        return false;
    }
    // streams beside the first: the two ops may belong to different ones
    if (ctx.curr_stream_no != 0 || (second->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return false;
    }
    const ggml_tensor * a = first->src[0];
    const ggml_tensor * b = second->src[0];
    if (!ggml_entropy_is_quantized(a->type) || b->type != a->type || a->ne[0] != b->ne[0] || a->ne[2] != b->ne[2]
            || first->src[1] != second->src[1] || first->src[2] != second->src[2] || !is_small(first)) {
        return false;
    }
    // the second result may not take the place of what the first op still reads or writes
    if (overlap(first, second) || overlap(first->src[1], second) || (first->src[2] != nullptr && overlap(first->src[2], second))) {
        return false;
    }
    mat_vec(ctx, first, second);
    return true;
}

bool ggml_cuda_entropy_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * w   = dst->src[0];
    const ggml_tensor * ids = dst->src[1];
    if (!ggml_entropy_is_quantized(w->type)) {
        return false;
    }
    const entropy_get_rows_args args = {
        (const uint8_t *) w->data, (int64_t) w->nb[2], (const int32_t *) ids->data, (int64_t) (ids->nb[0]/sizeof(int32_t)),
        (int64_t) (ids->nb[1]/sizeof(int32_t)), (int) w->ne[1], (float *) dst->data, (int64_t) (dst->nb[1]/sizeof(float)),
        (int64_t) (dst->nb[2]/sizeof(float)),
    };
    if (ggml_nelements(ids) == 0) {
        return true;
    }
    const stream_launcher launcher = { ctx.stream() };
    if (w->type == GGML_TYPE_EQ8) {
        entropy_launch_get_rows<GGML_TYPE_EQ8>(launcher, args, ids->ne[0], w->ne[0], w->ne[2], tuning_of(ctx.device));
    } else {
        entropy_launch_get_rows<GGML_TYPE_EQ4>(launcher, args, ids->ne[0], w->ne[0], w->ne[2], tuning_of(ctx.device));
    }
    return true;
}

// ---- registry ----------------------------------------------------------------------------------------------------------------------

// MMQ, which batches of MUL_MAT_ID go through, has no code for devices without dp4a.
static bool has_dp4a() {
    for (int i = 0; i < ggml_cuda_info().device_count; i++) {
        if (ggml_cuda_info().devices[i].cc < GGML_CUDA_CC_DP4A) {
            return false;
        }
    }
    return true;
}

// Exactly what the functions above do. Weights without a buffer are still to be allocated, on this device.
static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (op->op == GGML_OP_NONE) {
        return true;
    }
    const ggml_tensor * w = op->src[0];
    if (w == nullptr || !ggml_entropy_is_quantized(w->type) || w->ne[3] != 1 || op->type != GGML_TYPE_F32) {
        return false;
    }
    if (w->buffer != nullptr && ggml_backend_buffer_is_host(w->buffer)) {
        return false;
    }
    for (int i = 1; i < GGML_MAX_SRC; i++) {
        if (op->src[i] != nullptr && ggml_entropy_is_type(op->src[i]->type)) {
            return false;
        }
    }
    const ggml_tensor * x = op->src[1];
    const auto is_float = [](const ggml_tensor * t) { return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float); };
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            return is_float(x) && x->ne[2] % w->ne[2] == 0 && x->ne[2] <= ENTROPY_MAX_GRID_YZ && x->ne[3] <= ENTROPY_MAX_GRID_YZ;
        case GGML_OP_MUL_MAT_ID:
            return (is_small(op) || has_dp4a()) && is_float(x) && x->ne[3] == 1 && op->src[2]->type == GGML_TYPE_I32
                && op->src[2]->nb[0] == sizeof(int32_t)
                && op->src[2]->ne[0] <= ENTROPY_MAX_GRID_YZ && op->src[2]->ne[1] <= ENTROPY_MAX_GRID_YZ && w->ne[2] <= ENTROPY_MAX_GRID_YZ;
        case GGML_OP_GET_ROWS:
            return x->type == GGML_TYPE_I32 && x->ne[2] == 1 && x->ne[3] == 1 && w->ne[2] <= ENTROPY_MAX_GRID_YZ;
        default:
            return false;
    }
}

void * ggml_cuda_entropy_get_proc_address(const char * name) {
    if (std::strcmp(name, "ggml_backend_entropy_supports_op") == 0) {
        return (void *) supports_op;
    }
    if (std::strcmp(name, "ggml_backend_entropy_refusal") == 0) {
        return (void *) switch_refusal;
    }
    return nullptr;
}

#else // HIP and MUSA: nothing is supported, so nothing comes here

bool ggml_cuda_entropy_mul_mat(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *, ggml_tensor *, ggml_cuda_mul_mat_t) {
    return false;
}

bool ggml_cuda_entropy_mul_mat_id(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

bool ggml_cuda_entropy_mul_mat_pair(ggml_backend_cuda_context &, ggml_tensor *, ggml_tensor *) {
    return false;
}

bool ggml_cuda_entropy_get_rows(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

void * ggml_cuda_entropy_get_proc_address(const char *) {
    return nullptr;
}

#endif
