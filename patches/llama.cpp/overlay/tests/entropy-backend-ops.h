// SPDX-License-Identifier: MIT
//
// Cases of test-backend-ops for ops with entropy-coded weights; included by test-backend-ops.cpp behind its class test_case.
//
// A backend is compared with the CPU's reference implementation, which for these ops is the kernel level ref. The perf cases have the
// shapes of upstream's own for MUL_MAT, so that a line here can be read beside one of Q8_0.
//
// The CPU reads weights in the layout of files, other devices in the device layout (ggml-entropy-lanes.h). A graph is built before it is
// known where it will run, so build_graph gives the weights room for either; initialize_tensors sees the buffer, fills in the layout that
// belongs there and sets the strides to what that takes. For the comparison test-backend-ops copies the tensors of the other backend to the
// CPU, strides and bytes as they are, so that the CPU's reference implementation also reads the device layout.

#pragma once

#include "../ggml/src/ggml-entropy.h"
#include "../ggml/src/ggml-entropy-lanes.h"

#include <cmath>
#include <random>

// A weight of n_mats matrices with normally distributed codes, in both layouts.
struct entropy_weight {
    std::vector<uint8_t> planes;
    std::vector<uint8_t> lanes;
};

static entropy_weight make_entropy_weight(ggml_type type, int64_t n_cols, int64_t n_rows, int64_t n_mats, bool offset) {
    std::mt19937 rng(42);
    const bool    is_eq8       = type == GGML_TYPE_EQ8;
    const int64_t n_groups     = (n_rows + GGML_ENTROPY_GROUP_ROWS - 1)/GGML_ENTROPY_GROUP_ROWS;
    const int64_t lanes_groups = (n_rows + GGML_ENTROPY_LANES - 1)/GGML_ENTROPY_LANES;

    std::vector<uint16_t> scales(n_rows);
    std::vector<float>    offsets(offset ? n_rows : 0);
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    for (int64_t r = 0; r < n_rows; r++) {
        scales[r] = ggml_fp32_to_fp16(uniform(rng)/(is_eq8 ? 32.0f : 2.0f)/std::sqrt((float) n_cols));
        if (offset) { // a multiple of 8 scales: EQ4 needs offset - 8*scale to be an f16
            offsets[r] = ggml_fp16_to_fp32(scales[r])*8.0f*(float) ((int) (rng() % 3) - 1);
        }
    }

    ggml_entropy_spec spec = {};
    spec.type      = type;
    spec.n_cols    = n_cols;
    spec.n_rows    = n_rows;
    spec.n_slabs   = n_mats;
    spec.tile_cols = ggml_entropy_lanes_default_tile_cols(n_rows, n_cols);
    spec.scales    = scales.data();
    spec.n_scales  = n_rows;
    spec.offsets   = offset ? offsets.data() : nullptr;
    spec.n_offsets = offset ? n_rows : 0;

    struct matrix {
        std::vector<int8_t>              codes;
        std::vector<ggml_entropy_extent> extents;
        ggml_entropy_plan                plan;
        std::vector<uint8_t>             lane_words;
        ggml_entropy_lanes_plan          lanes_plan;
    };
    const auto ok = [](ggml_entropy_status status) { GGML_ASSERT(status == GGML_ENTROPY_OK); };
    std::vector<matrix> mats(n_mats);
    std::normal_distribution<float> normal(0.0f, is_eq8 ? 10.0f : 1.5f);
    const float low = is_eq8 ? -128.0f : -8.0f;
    for (matrix & mat : mats) {
        mat.codes.resize(n_rows*n_cols);
        for (int8_t & q : mat.codes) {
            q = (int8_t) std::lround(std::min(std::max(normal(rng), low), -low - 1));
        }
        const int8_t * q = mat.codes.data();

        uint64_t counts[256] = {};
        int64_t  max_words   = 0;
        mat.lane_words.resize(lanes_groups*((n_cols + spec.tile_cols - 1)/spec.tile_cols)*GGML_ENTROPY_LANES);
        ok(ggml_entropy_lanes_count(type, n_rows, n_cols, q, 0, lanes_groups, counts));
        ok(ggml_entropy_lanes_plan_code(counts, &mat.lanes_plan));
        ok(ggml_entropy_lanes_measure(
            type, n_rows, n_cols, q, &mat.lanes_plan, spec.tile_cols, 0, lanes_groups, mat.lane_words.data(), &max_words));
        GGML_ASSERT(max_words <= GGML_ENTROPY_LANES_MAX_WORDS);
        spec.device_size = std::max<uint64_t>(spec.device_size, ggml_entropy_lanes_size(&spec, mat.lane_words.data()));

        uint64_t code_counts[256] = {};
        mat.extents.resize(n_groups);
        ok(ggml_entropy_count(type, n_rows, n_cols, q, 0, n_groups, code_counts));
        ok(ggml_entropy_plan_code(code_counts, &mat.plan));
        ok(ggml_entropy_measure(type, n_rows, n_cols, q, &mat.plan.code, 0, n_groups, mat.extents.data()));
    }
    size_t slab_size = 0;
    for (const matrix & mat : mats) {
        slab_size = std::max(slab_size, ggml_entropy_slab_size(&spec, &mat.plan.code, mat.extents.data()));
    }

    entropy_weight weight;
    weight.planes.resize(n_mats*slab_size);
    weight.lanes.resize(n_mats*spec.device_size);
    for (int64_t i = 0; i < n_mats; i++) {
        const matrix & mat = mats[i];
        uint8_t * slab = weight.planes.data() + i*slab_size;
        ok(ggml_entropy_begin(&spec, &mat.plan.code, mat.extents.data(), slab, slab_size));
        ok(ggml_entropy_encode_groups(mat.codes.data(), 0, n_groups, slab));
        ok(ggml_entropy_finish(slab, ggml_entropy_seed("w", i)));

        uint8_t * lanes = weight.lanes.data() + i*spec.device_size;
        ok(ggml_entropy_lanes_begin(&spec, &mat.lanes_plan, mat.lane_words.data(), lanes, spec.device_size));
        ok(ggml_entropy_lanes_encode_groups(&mat.lanes_plan, mat.codes.data(), 0, lanes_groups, lanes));
    }
    return weight;
}

// GGML_OP_MUL_MAT, GGML_OP_MUL_MAT_ID or GGML_OP_GET_ROWS.
struct test_entropy : public test_case {
    const ggml_op   op;
    const ggml_type type_a;
    const int64_t   m;      // rows
    const int64_t   n;      // columns of src1, tokens, or rows wanted
    const int64_t   k;
    const int64_t   n_mats;
    const int64_t   n_used; // experts per token
    const bool      offset;

    entropy_weight weight;

    test_entropy(ggml_op op, ggml_type type_a, int64_t m, int64_t n, int64_t k, int64_t n_mats = 1, int64_t n_used = 0, bool offset = false)
        : op(op), type_a(type_a), m(m), n(n), k(k), n_mats(n_mats), n_used(n_used), offset(offset) {}

    std::string vars() override {
        return VARS_TO_STR7(type_a, m, n, k, n_mats, n_used, offset);
    }

    double max_nmse_err() override {
        return 5e-4; // activations are quantized, on a GPU to another type
    }

    uint64_t op_flops(ggml_tensor *) override {
        return op == GGML_OP_GET_ROWS ? 0 : 2*m*n*k*std::max<int64_t>(1, op == GGML_OP_MUL_MAT_ID ? n_used : n_mats);
    }

    void set_size(ggml_tensor * w, size_t n_bytes) const {
        w->nb[2] = n_bytes/n_mats;
        w->nb[3] = n_bytes;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        if (weight.planes.empty()) {
            weight = make_entropy_weight(type_a, k, m, n_mats, offset);
        }
        ggml_tensor * w = ggml_new_tensor_3d(ctx, type_a, k, m, n_mats);
        set_size(w, std::max(weight.planes.size(), weight.lanes.size()));
        ggml_set_name(w, "w");
        switch (op) {
            case GGML_OP_MUL_MAT:
                return ggml_mul_mat(ctx, w, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, n, n_mats));
            case GGML_OP_MUL_MAT_ID:
                return ggml_mul_mat_id(ctx, w, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, n_used, n),
                    ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, n));
            default:
                return ggml_get_rows(ctx, w, ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n, n_mats));
        }
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng(7);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->type == type_a) {
                const std::vector<uint8_t> & payload = ggml_backend_buffer_is_host(t->buffer) ? weight.planes : weight.lanes;
                set_size(t, payload.size());
                ggml_backend_tensor_set(t, payload.data(), 0, payload.size());
            } else if (t->type == GGML_TYPE_I32) {
                const int64_t n_choices = op == GGML_OP_MUL_MAT_ID ? n_mats : m;
                std::vector<int32_t> ids(ggml_nelements(t));
                for (size_t i = 0; i < ids.size(); i++) { // experts of one token differ
                    ids[i] = (int32_t) ((rng() % n_choices/(n_used > 0 ? n_used : 1)*std::max<int64_t>(1, n_used) + i) % n_choices);
                }
                ggml_backend_tensor_set(t, ids.data(), 0, ids.size()*sizeof(int32_t));
            } else {
                init_tensor_uniform(t);
            }
        }
    }
};

static void add_entropy_test_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const ggml_type type : { GGML_TYPE_EQ8, GGML_TYPE_EQ4 }) {
        for (const bool offset : { false, true }) {
            for (const int64_t m : { 1, 31, 32, 33, 128 }) {
                for (const int64_t k : { 32, 64, 576, 2048 }) {
                    for (const int64_t n : { 1, 2, 8, 9, 32 }) {
                        cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT, type, m, n, k, 1, 0, offset));
                    }
                }
                cases.emplace_back(new test_entropy(GGML_OP_GET_ROWS, type, m, 5, 576, 1, 0, offset));
            }
            cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT,  type, 65, 7, 256, 3, 0, offset));
            cases.emplace_back(new test_entropy(GGML_OP_GET_ROWS, type, 65, 7, 256, 3, 0, offset));
            for (const int64_t n : { 1, 4, 40 }) {
                cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT_ID, type, 96, n, 256, 8, 2, offset));
                cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT_ID, type, 33, n, 576, 4, 4, offset));
            }
        }
    }
}

static void add_entropy_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const ggml_type type : { GGML_TYPE_EQ8, GGML_TYPE_EQ4 }) {
        // as upstream's, of dense models and of one with 32 experts
        for (const int64_t n : { 1, 2, 4, 8, 512 }) {
            cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT, type, 4096, n, 14336));
        }
        cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT, type, 4096, 1, 4096, 1, 0, true));
        for (const int64_t n : { 1, 4, 8, 512 }) {
            cases.emplace_back(new test_entropy(GGML_OP_MUL_MAT_ID, type, 1792, n, 2048, 32, 4));
        }
    }
}
