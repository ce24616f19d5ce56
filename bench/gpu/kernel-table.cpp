// SPDX-License-Identifier: MIT
//
// Matrix products through ggml, as llama.cpp would run them: entropy-coded types beside stock types on the same shapes.
//
//     kernel-table JSON [DEVICE]
//
// A graph multiplies as many different matrices as fill 512 MB, one after the other: one alone would stay in the L2 cache. Times are of
// whole graphs (launches, quantizing of columns included), best of three, divided by the number of products.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "payload.h"

#include <chrono>
#include <cstring>
#include <string>

static std::vector<uint8_t> stock_matrix(ggml_type type, int64_t n_rows, int64_t n_cols) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    const int64_t n_random = std::min<int64_t>(n_rows, 64);
    std::vector<float> x(n_random*n_cols);
    for (float & value : x) {
        value = normal(generator);
    }
    const size_t row_size = ggml_row_size(type, n_cols);
    std::vector<uint8_t> rows(row_size*n_rows);
    if (type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(x.data(), (ggml_fp16_t *) rows.data(), n_random*n_cols);
    } else {
        ggml_quantize_chunk(type, x.data(), rows.data(), 0, n_random, n_cols, nullptr);
    }
    for (int64_t r = n_random; r < n_rows; r++) {
        std::memcpy(rows.data() + r*row_size, rows.data() + r%n_random*row_size, row_size);
    }
    return rows;
}

// In the layout that the CPU reads, or in that of other devices.
static std::vector<uint8_t> coded_rows(ggml_type type, int64_t n_rows, int64_t n_cols, double sigma, bool is_host) {
    const std::vector<int8_t> q = make_codes(type, n_rows, n_cols, sigma);
    const coded_matrix coded(type, n_rows, n_cols, ggml_entropy_lanes_default_tile_cols(n_rows, n_cols), q, false);
    return is_host ? coded.planes() : coded.lanes();
}

// Microseconds of one product.
static double measure(ggml_backend_t backend, ggml_type type, int64_t n_rows, int64_t n_cols, int64_t n_columns, const std::vector<uint8_t> & data) {
    const int n_matrices = (int) std::min<size_t>(64, (512u << 20)/data.size() + 1);
    ggml_init_params params = { ggml_tensor_overhead()*(2*n_matrices + 8) + ggml_graph_overhead_custom(256, false), nullptr, true };
    ggml_context * ctx = ggml_init(params);
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_cols, n_columns);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 256, false);
    std::vector<ggml_tensor *> weights;
    for (int i = 0; i < n_matrices; i++) {
        ggml_tensor * w = ggml_new_tensor_2d(ctx, type, n_cols, n_rows);
        if (ggml_entropy_is_type(type)) {
            w->nb[1] = n_cols;
            w->nb[2] = w->nb[3] = data.size();
        }
        weights.push_back(w);
        ggml_build_forward_expand(graph, ggml_mul_mat(ctx, w, x));
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    if (buffer == nullptr) {
        fprintf(stderr, "no memory for %d matrices\n", n_matrices);
        exit(1);
    }
    for (ggml_tensor * w : weights) {
        ggml_backend_tensor_set(w, data.data(), 0, data.size());
    }
    std::vector<float> values(n_cols*n_columns, 0.5f);
    ggml_backend_tensor_set(x, values.data(), 0, values.size()*sizeof(float));
    double best = 1e30;
    for (int repeat = 0; repeat < 6; repeat++) { // the first ones warm up, and capture a graph
        const auto begin = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        ggml_backend_synchronize(backend);
        const double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
        if (repeat >= 3) {
            best = std::min(best, us);
        }
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return best/n_matrices;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: kernel-table JSON [DEVICE]\n");
        return 2;
    }
    ggml_backend_load_all();
    ggml_backend_dev_t device = argc > 2 ? ggml_backend_dev_by_name(argv[2]) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (device == nullptr) {
        fprintf(stderr, "no such device\n");
        return 1;
    }
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    FILE * json = fopen(argv[1], "w");
    if (json == nullptr) {
        fprintf(stderr, "%s: cannot be written\n", argv[1]);
        return 1;
    }
    fprintf(json, "{\n  \"device\": \"%s\",\n  \"rows\": [", ggml_backend_dev_description(device));
    struct contestant { const char * name; ggml_type type; double sigma; };
    const contestant all[] = {
        { "Q8_0", GGML_TYPE_Q8_0, 0 }, { "EQ8 5.3 bits", GGML_TYPE_EQ8, 9.5 }, { "EQ8 6.8 bits", GGML_TYPE_EQ8, 28 }, { "Q4_0", GGML_TYPE_Q4_0, 0 },
        { "Q4_K", GGML_TYPE_Q4_K, 0 }, { "EQ8 4.0 bits", GGML_TYPE_EQ8, 3.9 }, { "EQ4 3.0 bits", GGML_TYPE_EQ4, 1.95 },
    };
    const std::pair<int64_t, int64_t> shapes[] = { { 4096, 14336 }, { 14336, 4096 }, { 4096, 4096 }, { 1024, 4096 }, { 2048, 2048 } };
    bool first = true;
    const bool is_host = ggml_backend_buft_is_host(ggml_backend_get_default_buffer_type(backend));
    for (const auto & shape : shapes) {
        for (const contestant & one : all) {
            const std::vector<uint8_t> data = ggml_entropy_is_type(one.type) ?
                coded_rows(one.type, shape.first, shape.second, one.sigma, is_host) : stock_matrix(one.type, shape.first, shape.second);
            for (const int64_t n_columns : { 1, 2, 4, 8, 64, 512, 2048 }) {
                const double us = measure(backend, one.type, shape.first, shape.second, n_columns, data);
                fprintf(json,
                    "%s\n    {\"type\": \"%s\", \"rows\": %lld, \"cols\": %lld, \"columns\": %lld, \"bytes\": %zu, \"us\": %.2f, "
                    "\"gweights_per_s\": %.1f, \"gb_per_s\": %.1f}",
                    first ? "" : ",", one.name, (long long) shape.first, (long long) shape.second, (long long) n_columns, data.size(), us,
                    shape.first*shape.second/us/1e3, data.size()/us/1e3);
                fflush(json);
                first = false;
                printf("%-13s %5lld x %5lld, %4lld columns: %9.2f us\n", one.name, (long long) shape.first, (long long) shape.second,
                    (long long) n_columns, us);
            }
        }
    }
    fprintf(json, "\n  ]\n}\n");
    ggml_backend_free(backend);
    return fclose(json) == 0 ? 0 : 1;
}
