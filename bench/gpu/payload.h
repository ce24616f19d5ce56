// SPDX-License-Identifier: MIT
//
// Random entropy-coded matrices for the programs of this folder, by the C codec: in the layout of files, and in that of devices.

#pragma once

#include "ggml-entropy.h"
#include "ggml-entropy-lanes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

static inline void require(ggml_entropy_status status, const char * what) {
    if (status != GGML_ENTROPY_OK) {
        fprintf(stderr, "%s: %s\n", what, ggml_entropy_status_str(status));
        exit(1);
    }
}

enum fill_t { FILL_NORMAL, FILL_ONE_SYMBOL, FILL_ESCAPES, FILL_UNIFORM, FILL_DRIFT };

// Codes (n_rows, n_cols). FILL_DRIFT: rows of few bits beside rows of many.
static inline std::vector<int8_t> make_codes(ggml_type type, int64_t n_rows, int64_t n_cols, double sigma, fill_t fill = FILL_NORMAL) {
    const int low = type == GGML_TYPE_EQ8 ? -128 : -8, high = -low - 1;
    std::mt19937 generator((uint32_t) (n_rows*31 + n_cols + (int) (sigma*100) + fill));
    std::normal_distribution<float> normal(0.0f, (float) sigma);
    std::uniform_int_distribution<int> any(low, high);
    std::vector<int8_t> q(n_rows*n_cols);
    // random codes, then the same with a shift: making a billion normal numbers takes longer than any measurement
    const size_t n_random = std::min<size_t>(q.size(), 1 << 22);
    for (size_t i = 0; i < n_random; i++) {
        const bool far   = fill == FILL_ESCAPES && generator() % 256 == 0;
        const bool drift = fill == FILL_DRIFT && i/n_cols % 2 == 1;
        q[i] = (int8_t) (fill == FILL_ONE_SYMBOL ? 3 : fill == FILL_UNIFORM || far || drift ? any(generator) :
            fill == FILL_DRIFT ? 1 : std::max(low, std::min(high, (int) std::lrint(normal(generator)))));
    }
    for (size_t i = n_random; i < q.size(); i++) {
        q[i] = q[(i*7 + i/n_random) % n_random];
    }
    return q;
}

// Calls body(i, group0, group1) for parts of n_groups row groups, on all cores. Returns the number of parts.
template <typename Body>
static int64_t each_part(int64_t n_groups, const Body & body) {
    const int64_t n_parts = std::max<int64_t>(1, std::min<int64_t>(std::thread::hardware_concurrency(), n_groups));
    std::vector<std::thread> workers;
    for (int64_t i = 0; i < n_parts; i++) {
        workers.emplace_back([&body, i, n_groups, n_parts]() { body(i, n_groups*i/n_parts, n_groups*(i + 1)/n_parts); });
    }
    for (std::thread & worker : workers) {
        worker.join();
    }
    return n_parts;
}

// A matrix to be coded, with a scale per row and, if wanted, offsets.
struct coded_matrix {
    const std::vector<int8_t> & q; // (n_rows, n_cols)
    ggml_entropy_spec       spec = {};
    std::vector<uint16_t>   scales;
    std::vector<float>      offsets;
    // of the device layout
    ggml_entropy_lanes_plan lanes_plan;
    std::vector<uint8_t>    lane_words;

    // tile_cols becomes smaller where a lane would exceed its length.
    coded_matrix(ggml_type type, int64_t n_rows, int64_t n_cols, int64_t tile_cols, const std::vector<int8_t> & q, bool has_offsets) :
            q(q), scales(n_rows), offsets(has_offsets ? n_rows : 0) {
        for (int64_t r = 0; r < n_rows; r++) {
            scales[r] = (uint16_t) (0x1400 + r%700); // about 0.001: activations stay finite in models of such weights
            if (has_offsets) { // EQ4 needs offset - 8*scale to be an f16: multiples of 8 scales
                offsets[r] = type == GGML_TYPE_EQ4 ? 8*ggml_fp16_to_fp32(scales[r])*(float) (r%3 - 1) : (float) (r%5 - 2)*0.0078125f;
            }
        }
        spec.type      = type;
        spec.n_cols    = n_cols;
        spec.n_rows    = n_rows;
        spec.n_slabs   = 1;
        spec.scales    = scales.data();
        spec.n_scales  = n_rows;
        spec.offsets   = has_offsets ? offsets.data() : nullptr;
        spec.n_offsets = (int64_t) offsets.size();
        plan_lanes(tile_cols);
    }

    coded_matrix(const coded_matrix &) = delete;

    // As GPU kernels read it.
    std::vector<uint8_t> lanes() const {
        std::vector<uint8_t> slab(spec.device_size, 0);
        require(ggml_entropy_lanes_begin(&spec, &lanes_plan, lane_words.data(), slab.data(), slab.size()), "begin");
        each_part(n_groups(GGML_ENTROPY_LANES), [&](int64_t, int64_t group0, int64_t group1) {
            require(ggml_entropy_lanes_encode_groups(&lanes_plan, q.data(), group0, group1, slab.data()), "encode");
        });
        return slab;
    }

    // As it stands in a file, and as the CPU reads it, of a tensor that has no name: ggml_entropy_finish with another seed gives it one.
    std::vector<uint8_t> planes() const {
        const int64_t n = n_groups(GGML_ENTROPY_GROUP_ROWS);
        const auto counts = sum_counts(n, ggml_entropy_count);
        ggml_entropy_plan plan;
        require(ggml_entropy_plan_code(counts.data(), &plan), "plan");
        std::vector<ggml_entropy_extent> extents(n);
        each_part(n, [&](int64_t, int64_t group0, int64_t group1) {
            require(ggml_entropy_measure(
                spec.type, spec.n_rows, spec.n_cols, q.data(), &plan.code, group0, group1, extents.data()), "measure");
        });
        std::vector<uint8_t> slab(ggml_entropy_slab_size(&spec, &plan.code, extents.data()), 0);
        require(ggml_entropy_begin(&spec, &plan.code, extents.data(), slab.data(), slab.size()), "begin");
        each_part(n, [&](int64_t, int64_t group0, int64_t group1) {
            require(ggml_entropy_encode_groups(q.data(), group0, group1, slab.data()), "encode");
        });
        require(ggml_entropy_finish(slab.data(), ggml_entropy_seed("", 0)), "finish");
        return slab;
    }

private:
    int64_t n_groups(int64_t rows) const {
        return (spec.n_rows + rows - 1)/rows;
    }

    template <typename Count>
    std::vector<uint64_t> sum_counts(int64_t n, const Count & count) const {
        std::vector<std::vector<uint64_t>> counts(std::thread::hardware_concurrency() + 1, std::vector<uint64_t>(256));
        each_part(n, [&](int64_t i, int64_t group0, int64_t group1) {
            require(count(spec.type, spec.n_rows, spec.n_cols, q.data(), group0, group1, counts[i].data()), "count");
        });
        for (size_t i = 1; i < counts.size(); i++) {
            for (int u = 0; u < 256; u++) {
                counts[0][u] += counts[i][u];
            }
        }
        return counts[0];
    }

    void plan_lanes(int64_t tile_cols) {
        const int64_t n = n_groups(GGML_ENTROPY_LANES);
        const auto counts = sum_counts(n, ggml_entropy_lanes_count);
        require(ggml_entropy_lanes_plan_code(counts.data(), &lanes_plan), "plan");
        for (;; tile_cols /= 2) {
            lane_words.assign(n*((spec.n_cols + tile_cols - 1)/tile_cols)*GGML_ENTROPY_LANES, 0);
            std::vector<int64_t> longest(std::thread::hardware_concurrency() + 1);
            each_part(n, [&](int64_t i, int64_t group0, int64_t group1) {
                require(ggml_entropy_lanes_measure(spec.type, spec.n_rows, spec.n_cols, q.data(), &lanes_plan, tile_cols, group0, group1,
                    lane_words.data(), &longest[i]), "measure");
            });
            if (*std::max_element(longest.begin(), longest.end()) <= GGML_ENTROPY_LANES_MAX_WORDS) {
                break;
            }
        }
        spec.tile_cols   = tile_cols;
        spec.device_size = ggml_entropy_lanes_size(&spec, lane_words.data());
    }
};
