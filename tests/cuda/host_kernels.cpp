// SPDX-License-Identifier: MIT
//
// The CUDA kernels of entropy-coded tensors as a library for Python, run by simt.h, and how the model loader brings tensors into the layout
// that they read. Every function returns an empty string or what went wrong.

#include "entropy/entropy-launch.cuh"
#include "llama-entropy-codec.h"

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
    entropy_tuning tuning = entropy_tuning_of(900, (size_t) options.shared_size, 132);
    tuning.mat_vec_warps = std::min(tuning.mat_vec_warps, (int) options.n_warps);
    tuning.rows_warps    = std::min(tuning.rows_warps,    (int) options.n_warps);
    simt::backwards = options.backwards != 0;
    simt::early     = options.early != 0;
    return tuning;
}

static void allow(const void * p, size_t n) {
    simt::memory[(uintptr_t) p] = n;
}

// What other kernels write or read: a kernel that is launched early has to wait before it touches it.
static void allow_moving(const void * p, size_t n) {
    allow(p, n);
    simt::moving[(uintptr_t) p] = n;
}

static const struct {
    template <typename Kernel, typename Args>
    void operator()(Kernel kernel, dim3 grid, int n_threads, int n_shared, const Args & args) const {
        simt::launch(kernel, grid, (uint32_t) n_threads, (size_t) n_shared, args);
    }

    template <typename Kernel, typename Args>
    void early(Kernel kernel, dim3 grid, int n_threads, int n_shared, const Args & args) const {
        simt::unwaited = true;
        operator()(kernel, grid, n_threads, n_shared, args);
        simt::unwaited = false;
    }
} launcher;

template <typename Body>
static const char * guarded(const Body & body) {
    message.clear();
    simt::memory.clear();
    simt::moving.clear();
    try {
        body();
    } catch (const std::exception & e) {
        message = e.what();
    }
    simt::unwaited = false;
    return message.c_str();
}

struct shape {
    int32_t type, plain;
    int64_t n_cols, n_rows, n_slabs, slab_stride;
};

// payload: in the layout of the file; device_size takes the place of what its headers say.
extern "C" const char * host_make_lanes(const shape * s, const run_options *, const uint8_t * payload, int64_t device_size, uint8_t * to) {
    return guarded([&]() {
        llama_entropy_slabs slabs(s->n_slabs);
        for (int64_t i = 0; i < s->n_slabs; i++) {
            const ggml_entropy_status status = ggml_entropy_validate_slab(payload + i*s->slab_stride, s->slab_stride, &slabs[i]);
            if (status != GGML_ENTROPY_OK) {
                throw std::runtime_error(ggml_entropy_status_str(status));
            }
            slabs[i].header.device_size = device_size;
        }
        llama_entropy_lanes lanes;
        // one slab more at a time with every call: 1, then 2, ...
        for (int64_t slab0 = 0, n = 1; slab0 < s->n_slabs; slab0 += n++) {
            if (!lanes.make(slabs, slab0, std::min(slab0 + n, s->n_slabs), to + slab0*device_size)) {
                throw std::runtime_error(lanes.status != GGML_ENTROPY_OK ? ggml_entropy_status_str(lanes.status) :
                    "slab " + std::to_string(lanes.misfit) + " needs " + std::to_string(lanes.needed));
            }
        }
    });
}

extern "C" const char * host_decode(const shape * s, const run_options * o, const uint8_t * payload, int64_t group0, int64_t n_groups, uint8_t * to) {
    return guarded([&]() {
        const size_t row_size = ggml_row_size((ggml_type) s->plain, s->n_cols);
        const int64_t n_rows  = std::min(n_groups*ENTROPY_LANES, s->n_rows - group0*ENTROPY_LANES);
        allow(payload, s->slab_stride*s->n_slabs);
        allow(to, row_size*n_rows*s->n_slabs);
        const entropy_rows_args args = {
            payload, s->slab_stride, (int) group0, to, (int64_t) row_size, (int64_t) row_size*n_rows, nullptr,
        };
        if (!entropy_launch_decode(launcher, (ggml_type) s->type, (ggml_type) s->plain, args, n_groups, s->n_cols, s->n_rows, s->n_slabs,
            tuning_of(*o))) {
            throw std::runtime_error("no such pair of types");
        }
    });
}

extern "C" const char * host_get_rows(const shape * s, const run_options * o, const uint8_t * payload, const int32_t * ids, int64_t n_ids,
        float * to) {
    return guarded([&]() {
        const entropy_tuning tuning = tuning_of(*o);
        allow(payload, s->slab_stride*s->n_slabs);
        allow(ids, n_ids*s->n_slabs*4);
        allow(to, n_ids*s->n_slabs*s->n_cols*4);
        const entropy_get_rows_args args = { payload, s->slab_stride, ids, 1, n_ids, (int) s->n_rows, to, s->n_cols, s->n_cols*n_ids };
        if (s->type == GGML_TYPE_EQ8) {
            entropy_launch_get_rows<GGML_TYPE_EQ8>(launcher, args, n_ids, s->n_cols, s->n_slabs, tuning);
        } else {
            entropy_launch_get_rows<GGML_TYPE_EQ4>(launcher, args, n_ids, s->n_cols, s->n_slabs, tuning);
        }
    });
}

// x: [n2][n1][n_cols]; y: [n2][n1][n_rows]. With ids [n_tokens][n_slots]: x [n_tokens][n1][n_cols], y [n_tokens][n_slots][n_rows].
// A second matrix, of n_rows2 rows, meets the same columns if payload2 is given.
struct mat_vec_call {
    const float   * x;
    int64_t         n1, n2;
    const int32_t * ids;
    int64_t         n_slots;
    float         * y;
    const uint8_t * payload2;
    int64_t         n_rows2, slab_stride2;
    float         * y2;
};

template <ggml_type TYPE>
static void mat_vec(const shape & s, const run_options & o, const uint8_t * payload, const mat_vec_call & c) {
    const entropy_tuning tuning = tuning_of(o);
    const int64_t n_columns = c.n1*c.n2;
    std::vector<entropy_block> blocks(entropy_columns::n_blocks(n_columns, s.n_cols));
    std::memset((void *) blocks.data(), 0xFF, blocks.size()*sizeof(entropy_block)); // scales that are no numbers: a term that is read was written
    const entropy_columns columns = { blocks.data(), n_columns, (int) s.n_cols };
    const int64_t n_y1 = c.ids != nullptr ? c.n_slots : c.n1;
    allow(payload, s.slab_stride*s.n_slabs);
    allow_moving(c.x, n_columns*s.n_cols*4);
    allow_moving(blocks.data(), blocks.size()*sizeof(entropy_block));
    if (c.ids != nullptr) {
        allow_moving(c.ids, c.n_slots*c.n2*4);
    }
    const bool two = c.payload2 != nullptr;
    const int64_t n_rows[2] = { s.n_rows, two ? c.n_rows2 : 0 };
    entropy_mat_vec_args args = {};
    for (int i = 0; i < 2; i++) {
        const bool other = i == 1 && two;
        args.payload[i]     = other ? c.payload2 : payload;
        args.slab_stride[i] = other ? c.slab_stride2 : s.slab_stride;
        args.y[i]           = other ? c.y2 : c.y;
        args.y1[i]          = n_rows[other];
        args.y2[i]          = c.ids != nullptr ? n_rows[other] : n_rows[other]*c.n1;
        args.y3[i]          = c.ids != nullptr ? n_rows[other]*c.n_slots : 0;
        allow(args.payload[i], args.slab_stride[i]*s.n_slabs);
        allow_moving(args.y[i], n_rows[other]*n_y1*c.n2*4);
    }
    const entropy_routes routes = { c.ids, 1, c.n_slots, (int) c.n_slots, (int) s.n_slabs };
    entropy_launch_quantize<TYPE>(launcher, {
        { args.payload[0], args.payload[1] }, { args.slab_stride[0], args.slab_stride[1] }, routes,
        { c.x, c.n1, c.n2, s.n_cols, s.n_cols*c.n1, 0 }, columns,
    });
    args.columns         = columns;
    args.n1              = c.n1;
    args.planes_per_slab = 1;
    if (c.ids != nullptr) {
        args.ids       = c.ids;
        args.ids_s0    = 1;
        args.ids_s1    = c.n_slots;
        args.n_experts = (int) s.n_slabs;
        entropy_launch_mat_vec<TYPE>(launcher, args, 1, n_rows, c.n_slots, c.n2, tuning);
    } else {
        args.n2              = c.n2;
        args.planes_per_slab = (int) (c.n2/s.n_slabs);
        entropy_launch_mat_vec<TYPE>(launcher, args, (int) c.n1, n_rows, c.n2, 1, tuning);
    }
}

extern "C" const char * host_mat_vec(
        const shape * s, const run_options * o, const uint8_t * payload, const float * x, int64_t n1, int64_t n2,
        const int32_t * ids, int64_t n_slots, float * y, const uint8_t * payload2, int64_t n_rows2, int64_t slab_stride2, float * y2) {
    return guarded([&]() {
        const mat_vec_call call = { x, n1, n2, ids, n_slots, y, payload2, n_rows2, slab_stride2, y2 };
        if (s->type == GGML_TYPE_EQ8) {
            mat_vec<GGML_TYPE_EQ8>(*s, *o, payload, call);
        } else {
            mat_vec<GGML_TYPE_EQ4>(*s, *o, payload, call);
        }
    });
}

// y: as host_mat_vec's, to which offset * sum(x) is added.
extern "C" const char * host_add_offsets(
        const shape * s, const run_options * o, const uint8_t * payload, const float * x, int64_t n1, int64_t n2,
        const int32_t * ids, int64_t n_slots, float * y) {
    return guarded([&]() {
        tuning_of(*o);
        const int64_t n_y1 = ids != nullptr ? n_slots : n1;
        allow(payload, s->slab_stride*s->n_slabs);
        allow(x, n1*n2*s->n_cols*4);
        allow(y, n_y1*n2*s->n_rows*4);
        entropy_offsets_args args = {};
        args.payload         = payload;
        args.slab_stride     = s->slab_stride;
        args.source          = { x, n1, n2, s->n_cols, s->n_cols*n1, 0 };
        args.y               = y;
        args.y1              = s->n_rows;
        args.y2              = s->n_rows*n_y1;
        args.n_cols          = (int) s->n_cols;
        args.planes_per_slab = (int) std::max<int64_t>(1, n2/s->n_slabs);
        dim3 grid((uint32_t) n1, (uint32_t) n2, 1);
        if (ids != nullptr) {
            allow(ids, n_slots*n2*4);
            args.ids       = ids;
            args.ids_s0    = 1;
            args.ids_s1    = n_slots;
            args.n_experts = (int) s->n_slabs;
            grid = dim3(1, (uint32_t) n_slots, (uint32_t) n2);
        }
        entropy_launch_add_offsets(launcher, args, grid);
    });
}

// n_routes: int32 [n_slabs], not zero where an expert has a column
extern "C" const char * host_count_routes(
        const shape * s, const run_options * o, const uint8_t *, const int32_t * ids, int64_t n_slots, int64_t n_tokens, int32_t * n_routes) {
    return guarded([&]() {
        tuning_of(*o);
        allow(ids, n_slots*n_tokens*4);
        allow(n_routes, s->n_slabs*4);
        simt::launch(entropy_count_routes, dim3(1), 64, 0, ids, (int64_t) 1, n_slots, (int) n_slots, (int) n_tokens, (int) s->n_slabs, n_routes);
    });
}
