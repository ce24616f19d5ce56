// SPDX-License-Identifier: MIT
//
// Random entropy-coded matrices for the programs of this folder, by the C codec.

#pragma once

#include "ggml-entropy.h"

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

// One slab with a scale per row and, if wanted, offsets. tile_cols becomes smaller where a lane would exceed its length.
static inline std::vector<uint8_t> encode_payload(
        ggml_type type, int64_t n_rows, int64_t n_cols, int64_t tile_cols, const std::vector<int8_t> & q, bool offsets = false) {
    const int64_t n_groups  = (n_rows + 31)/32;
    const int64_t n_workers = std::max(1u, std::thread::hardware_concurrency());
    const auto parallel = [&](const auto & body) {
        std::vector<std::thread> workers;
        for (int64_t i = 0; i < n_workers; i++) {
            workers.emplace_back([&body, i, n_groups, n_workers]() { body(i, n_groups*i/n_workers, n_groups*(i + 1)/n_workers); });
        }
        for (std::thread & worker : workers) {
            worker.join();
        }
    };
    std::vector<std::vector<uint64_t>> counts(n_workers, std::vector<uint64_t>(256));
    parallel([&](int64_t i, int64_t group0, int64_t group1) {
        require(ggml_entropy_count(type, n_rows, n_cols, q.data(), group0, group1, counts[i].data()), "count");
    });
    for (int64_t i = 1; i < n_workers; i++) {
        for (int u = 0; u < 256; u++) {
            counts[0][u] += counts[i][u];
        }
    }
    ggml_entropy_plan plan;
    require(ggml_entropy_plan_code(counts[0].data(), &plan), "plan");

    std::vector<uint16_t> scales(n_rows);
    std::vector<float>    offset(offsets ? n_rows : 0);
    for (int64_t r = 0; r < n_rows; r++) {
        scales[r] = (uint16_t) (0x1400 + r%700); // about 0.001: activations stay finite in models of such weights
        if (offsets) { // EQ4 needs offset - 8*scale to be an f16: multiples of 8 scales
            offset[r] = type == GGML_TYPE_EQ4 ? 8*ggml_fp16_to_fp32(scales[r])*(float) (r%3 - 1) : (float) (r%5 - 2)*0.0078125f;
        }
    }
    std::vector<uint8_t> lane_words;
    for (;; tile_cols /= 2) {
        const int64_t n_slices = (n_cols + tile_cols - 1)/tile_cols;
        lane_words.assign(n_groups*n_slices*32, 0);
        std::vector<int64_t> longest(n_workers);
        parallel([&](int64_t i, int64_t group0, int64_t group1) {
            require(ggml_entropy_measure(type, n_rows, n_cols, q.data(), &plan, tile_cols, group0, group1, lane_words.data(), &longest[i]), "measure");
        });
        if (*std::max_element(longest.begin(), longest.end()) <= GGML_ENTROPY_MAX_LANE_WORDS) {
            break;
        }
    }
    ggml_entropy_spec spec = {};
    spec.type      = type;
    spec.n_cols    = n_cols;
    spec.n_rows    = n_rows;
    spec.n_slabs   = 1;
    spec.tile_cols = tile_cols;
    spec.scales    = scales.data();
    spec.n_scales  = n_rows;
    spec.offsets   = offsets ? offset.data() : nullptr;
    spec.n_offsets = (int64_t) offset.size();
    std::vector<uint8_t> payload(ggml_entropy_slab_size(&spec, lane_words.data()), 0);
    require(ggml_entropy_begin(&spec, &plan, lane_words.data(), payload.data(), payload.size()), "begin");
    parallel([&](int64_t, int64_t group0, int64_t group1) {
        require(ggml_entropy_encode_groups(&plan, q.data(), group0, group1, payload.data()), "encode");
    });
    require(ggml_entropy_finish(payload.data()), "finish");
    return payload;
}
