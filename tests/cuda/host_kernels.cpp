// SPDX-License-Identifier: MIT
//
// The CUDA kernels of entropy-coded tensors as a library for Python, run by simt.h. Every function returns an empty string or what went wrong.

#include "entropy/entropy-launch.cuh"

#include <stdexcept>
#include <string>

static std::string message;

struct run_options {
    int32_t n_warps;     // of a block at most
    int32_t backwards;   // the last thread first
    int32_t early;       // copies land at once
    int32_t reserved;
    int64_t shared_size; // of a block
};

static entropy_tuning tuning_of(const run_options & options) {
    entropy_tuning tuning = entropy_tuning_of(900, (size_t) options.shared_size);
    tuning.mat_vec_warps = std::min(tuning.mat_vec_warps, (int) options.n_warps);
    tuning.rows_warps    = std::min(tuning.rows_warps,    (int) options.n_warps);
    simt::backwards = options.backwards != 0;
    simt::early     = options.early != 0;
    return tuning;
}

static void allow(const void * p, size_t n) {
    simt::memory[(uintptr_t) p] = n;
}

static const auto launcher = [](auto kernel, dim3 grid, int n_threads, int n_shared, const auto & args) {
    simt::launch(kernel, grid, (uint32_t) n_threads, (size_t) n_shared, args);
};

template <typename Body>
static const char * guarded(const Body & body) {
    message.clear();
    simt::memory.clear();
    try {
        body();
    } catch (const std::exception & e) {
        message = e.what();
    }
    return message.c_str();
}

struct shape {
    int32_t type, plain;
    int64_t n_cols, n_rows, n_slabs, slab_stride;
};

extern "C" const char * host_decode(const shape * s, const run_options * o, const uint8_t * payload, int64_t group0, int64_t n_groups, uint8_t * to) {
    return guarded([&]() {
        const size_t row_size = ggml_row_size((ggml_type) s->plain, s->n_cols);
        const int64_t n_rows  = std::min(n_groups*ENTROPY_LANES, s->n_rows - group0*ENTROPY_LANES);
        allow(payload, s->slab_stride*s->n_slabs);
        allow(to, row_size*n_rows*s->n_slabs);
        const entropy_rows_args args = {
            payload, s->slab_stride, (int) group0, to, (int64_t) row_size, (int64_t) row_size*n_rows, nullptr,
        };
        if (!entropy_launch_decode(launcher, (ggml_type) s->type, (ggml_type) s->plain, args, n_groups, s->n_cols, s->n_rows, s->n_slabs, tuning_of(*o))) {
            throw std::runtime_error("no such pair of types");
        }
    });
}

extern "C" const char * host_get_rows(const shape * s, const run_options * o, const uint8_t * payload, const int32_t * ids, int64_t n_ids, float * to) {
    return guarded([&]() {
        tuning_of(*o);
        allow(payload, s->slab_stride*s->n_slabs);
        allow(ids, n_ids*s->n_slabs*4);
        allow(to, n_ids*s->n_slabs*s->n_cols*4);
        const entropy_get_rows_args args = { payload, s->slab_stride, ids, 1, n_ids, (int) s->n_rows, to, s->n_cols, s->n_cols*n_ids };
        if (s->type == GGML_TYPE_EQ8) {
            entropy_launch_get_rows<GGML_TYPE_EQ8>(launcher, args, n_ids, s->n_cols, s->n_slabs);
        } else {
            entropy_launch_get_rows<GGML_TYPE_EQ4>(launcher, args, n_ids, s->n_cols, s->n_slabs);
        }
    });
}

// x: [n2][n1][n_cols]; y: [n2][n1][n_rows]. With ids [n_tokens][n_slots]: x [n_tokens][n1][n_cols], y [n_tokens][n_slots][n_rows].
template <ggml_type TYPE>
static void mat_vec(
        const shape & s, const run_options & o, const uint8_t * payload, const float * x, int64_t n1, int64_t n2,
        const int32_t * ids, int64_t n_slots, float * y) {
    const entropy_tuning tuning = tuning_of(o);
    const int64_t n_columns = n1*n2;
    std::vector<int4> memory(entropy_columns::size(n_columns, s.n_cols)/sizeof(int4) + 1);
    const entropy_columns columns = entropy_columns::at(memory.data(), n_columns, s.n_cols);
    const int64_t n_results = (ids != nullptr ? n_slots*n2 : n_columns)*s.n_rows;
    allow(payload, s.slab_stride*s.n_slabs);
    allow(x, n_columns*s.n_cols*4);
    allow(y, n_results*4);
    allow(memory.data(), memory.size()*sizeof(int4));
    if (ids != nullptr) {
        allow(ids, n_slots*n2*4);
    }
    entropy_launch_quantize<TYPE>(launcher, { payload, { x, n1, n2, s.n_cols, s.n_cols*n1, 0 }, columns });

    entropy_mat_vec_args args = {};
    args.payload     = payload;
    args.slab_stride = s.slab_stride;
    args.columns     = columns;
    args.y           = y;
    args.n1          = n1;
    args.planes_per_slab = 1;
    if (ids != nullptr) {
        args.y2 = s.n_rows;
        args.y3 = s.n_rows*n_slots;
        args.ids = ids;
        args.ids_s0 = 1;
        args.ids_s1 = n_slots;
        args.n_experts = (int) s.n_slabs;
        entropy_launch_mat_vec<TYPE>(launcher, args, 1, s.n_rows, n_slots, n2, tuning);
    } else {
        args.y1 = s.n_rows;
        args.y2 = s.n_rows*n1;
        args.n2 = n2;
        args.planes_per_slab = (int) (n2/s.n_slabs);
        entropy_launch_mat_vec<TYPE>(launcher, args, (int) n1, s.n_rows, n2, 1, tuning);
    }
}

extern "C" const char * host_mat_vec(
        const shape * s, const run_options * o, const uint8_t * payload, const float * x, int64_t n1, int64_t n2,
        const int32_t * ids, int64_t n_slots, float * y) {
    return guarded([&]() {
        if (s->type == GGML_TYPE_EQ8) {
            mat_vec<GGML_TYPE_EQ8>(*s, *o, payload, x, n1, n2, ids, n_slots, y);
        } else {
            mat_vec<GGML_TYPE_EQ4>(*s, *o, payload, x, n1, n2, ids, n_slots, y);
        }
    });
}
