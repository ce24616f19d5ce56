// SPDX-License-Identifier: MIT
//
// The entropy kernels by themselves on a GPU: right first, then fast. Built in a minute with nvcc and the C codec; nothing of llama.cpp's CUDA
// backend is needed.
//
//     harness check [JSON]     every shape class against the CPU: weights bit-exact, products within a bound
//     harness small            a few small cases, for compute-sanitizer
//     harness table JSON       Gweights/s and GB/s of the mat-vec and of decoding rows, by shape, type, bits and tile_cols
//
// Matrices of the table are copied until they fill 512 MB, and calls take them in turn: one alone would stay in the L2 cache.

#include "entropy/entropy-launch.cuh"
#include "payload.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define CHECK(call)                                                                                \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        if (error_ != cudaSuccess) {                                                               \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static entropy_tuning tuning;

struct gpu_launcher {
    template <typename Args>
    void operator()(void (*kernel)(Args), dim3 grid, int n_threads, int n_shared, const Args & args) const {
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) tuning.shared_size));
        kernel<<<grid, n_threads, n_shared>>>(args);
        CHECK(cudaGetLastError());
    }
};

// Device memory with an end that compute-sanitizer knows.
template <typename T>
struct device_array {
    T    * data = nullptr;
    size_t size = 0;

    explicit device_array(size_t size) : size(size) { CHECK(cudaMalloc(&data, std::max<size_t>(size*sizeof(T), 1))); }
    explicit device_array(const std::vector<T> & from) : device_array(from.size()) {
        CHECK(cudaMemcpy(data, from.data(), size*sizeof(T), cudaMemcpyHostToDevice));
    }
    device_array(const device_array &) = delete;
    device_array(device_array && other) : data(other.data), size(other.size) { other.data = nullptr; }
    ~device_array() { cudaFree(data); }

    std::vector<T> host() const {
        std::vector<T> to(size);
        CHECK(cudaMemcpy(to.data(), data, size*sizeof(T), cudaMemcpyDeviceToHost));
        return to;
    }
};

struct matrix {
    ggml_type type;
    int64_t   n_rows, n_cols;
    std::vector<uint8_t> payload;
    double    bits; // a weight, container included
};

static matrix encode(ggml_type type, int64_t n_rows, int64_t n_cols, int64_t tile_cols, const std::vector<int8_t> & q, bool offsets) {
    matrix m = { type, n_rows, n_cols, encode_payload(type, n_rows, n_cols, tile_cols, q, offsets), 0 };
    m.bits = 8.0*m.payload.size()/n_rows/n_cols;
    return m;
}

// Weights as the codec decodes them.
static std::vector<float> weights_of(const matrix & m) {
    ggml_entropy_view view;
    require(ggml_entropy_validate_slab(m.payload.data(), m.payload.size(), &view), "validate");
    std::vector<float> w(m.n_rows*m.n_cols);
    auto decoder = std::make_unique<ggml_entropy_decoder>();
    ggml_entropy_decoder_open(decoder.get(), &view);
    for (int64_t group = 0; group < view.n_groups; group++) {
        const int n_lanes = (int) std::min<int64_t>(32, m.n_rows - group*32);
        for (int64_t slice = 0; slice < view.n_slices; slice++) {
            ggml_entropy_decoder_lanes(decoder.get(), group, slice, 0, n_lanes);
            ggml_entropy_decoder_rows(decoder.get(), group, slice, 0, n_lanes, GGML_TYPE_F32, w.data() + group*32*m.n_cols, m.n_cols*sizeof(float));
        }
    }
    return w;
}

struct vectors {
    device_array<float>   x, y;
    device_array<entropy_block> blocks;
    int64_t n_columns;

    vectors(const matrix & m, int64_t n_columns, const std::vector<float> & x) :
        x(x), y(n_columns*m.n_rows), blocks(entropy_columns::n_blocks(n_columns, m.n_cols)), n_columns(n_columns) {}
};

template <ggml_type TYPE>
static void run_mat_vec(const matrix & m, const uint8_t * payload, const vectors & v) {
    const entropy_columns columns = { v.blocks.data, v.n_columns, (int) m.n_cols };
    entropy_launch_quantize<TYPE>(gpu_launcher(), { { payload, payload }, { v.x.data, v.n_columns, 1, m.n_cols, 0, 0 }, columns });
    entropy_mat_vec_args args = {};
    args.payload[0] = payload;
    args.y[0]       = v.y.data;
    args.y1[0]      = m.n_rows;
    args.columns    = columns;
    args.n1      = v.n_columns;
    args.n2      = 1;
    args.planes_per_slab = 1;
    entropy_launch_mat_vec<TYPE>(gpu_launcher(), args, (int) v.n_columns, { m.n_rows, 0 }, 1, 1, tuning);
}

static void mat_vec(const matrix & m, const uint8_t * payload, const vectors & v) {
    if (m.type == GGML_TYPE_EQ8) {
        run_mat_vec<GGML_TYPE_EQ8>(m, payload, v);
    } else {
        run_mat_vec<GGML_TYPE_EQ4>(m, payload, v);
    }
}

static void decode(const matrix & m, const uint8_t * payload, ggml_type plain, size_t row_size, uint8_t * to) {
    const entropy_rows_args args = { payload, 0, 0, to, (int64_t) row_size, 0, nullptr };
    if (!entropy_launch_decode(gpu_launcher(), m.type, plain, args, (m.n_rows + 31)/32, m.n_cols, m.n_rows, 1, tuning)) {
        fprintf(stderr, "no such pair of types\n");
        exit(1);
    }
}

// ---- right -------------------------------------------------------------------------------------------------------------------------

static int n_checked = 0, n_wrong = 0;

static void expect(bool right, const matrix & m, const char * what, double error) {
    n_checked++;
    if (!right) {
        n_wrong++;
        printf("WRONG: %s, type %d, %lld x %lld, error %g\n", what, m.type, (long long) m.n_rows, (long long) m.n_cols, error);
    }
}

static void check_matrix(const matrix & m, const std::vector<int64_t> & all_columns) {
    const std::vector<float> w = weights_of(m);
    const device_array<uint8_t> payload(m.payload);
    ggml_entropy_header header;
    std::memcpy(&header, m.payload.data(), sizeof(header));

    for (const int64_t n_columns : all_columns) {
        // integers times a power of two: quantizing loses nothing, sums may only round
        std::vector<float> x(n_columns*m.n_cols);
        std::mt19937 generator((uint32_t) n_columns);
        for (size_t i = 0; i < x.size(); i++) {
            x[i] = (i%32 == 0 ? 127 : (int) (generator()%255) - 127)*0.0078125f;
        }
        const vectors v(m, n_columns, x);
        mat_vec(m, payload.data, v);
        const std::vector<float> y = v.y.host();
        double worst = 0;
        for (int64_t c = 0; c < n_columns; c++) {
            for (int64_t r = 0; r < m.n_rows; r++) {
                double sum = 0, size = 1e-30;
                for (int64_t k = 0; k < m.n_cols; k++) {
                    const double product = (double) w[r*m.n_cols + k]*x[c*m.n_cols + k];
                    sum  += product;
                    size += std::fabs(product);
                }
                const double error = std::fabs(y[c*m.n_rows + r] - sum)/size;
                worst = error > worst || std::isnan(error) ? error : worst;
            }
        }
        expect(worst <= 2e-6, m, "products", worst);
    }

    const ggml_type plain = ggml_entropy_plain_type(&header);
    const size_t row_size = plain == GGML_TYPE_F16 ? m.n_cols*2 : m.n_cols/32*(plain == GGML_TYPE_Q8_0 ? 34 : plain == GGML_TYPE_Q4_0 ? 18 : 20);
    std::vector<uint8_t> expected(row_size*m.n_rows);
    ggml_entropy_view view;
    require(ggml_entropy_open(m.payload.data(), m.payload.size(), &view), "open");
    require(ggml_entropy_decode_groups_plain(&view, 0, view.n_groups, expected.data()), "decode");
    device_array<uint8_t> rows(row_size*m.n_rows);
    decode(m, payload.data, plain, row_size, rows.data);
    expect(rows.host() == expected, m, "rows of the stock type", 0);

    const std::vector<int32_t> ids = { (int32_t) m.n_rows - 1, 0, (int32_t) m.n_rows/2 };
    const device_array<int32_t> ids_dev(ids);
    device_array<float> got(ids.size()*m.n_cols);
    const entropy_get_rows_args args = { payload.data, 0, ids_dev.data, 1, 0, (int) m.n_rows, got.data, m.n_cols, 0 };
    if (m.type == GGML_TYPE_EQ8) {
        entropy_launch_get_rows<GGML_TYPE_EQ8>(gpu_launcher(), args, ids.size(), m.n_cols, 1);
    } else {
        entropy_launch_get_rows<GGML_TYPE_EQ4>(gpu_launcher(), args, ids.size(), m.n_cols, 1);
    }
    const std::vector<float> result = got.host();
    bool same = true;
    for (size_t i = 0; i < ids.size(); i++) {
        same = same && std::memcmp(result.data() + i*m.n_cols, w.data() + ids[i]*m.n_cols, m.n_cols*sizeof(float)) == 0;
    }
    expect(same, m, "single rows", 0);
}

static void check(bool small) {
    for (const ggml_type type : { GGML_TYPE_EQ8, GGML_TYPE_EQ4 }) {
        const double sigma = type == GGML_TYPE_EQ8 ? 9.5 : 1.95;
        const std::vector<int64_t> all = { 1, 2, 3, 4, 5, 6, 7, 8 };
        for (const int64_t n_rows : { 1, 31, 32, 33, 100 }) {
            for (const int64_t n_cols : { 32, 64, 576, 1120 }) {
                if (small && (n_rows > 33 || n_cols > 576)) {
                    continue;
                }
                for (const bool offsets : { false, true }) {
                    if (type == GGML_TYPE_EQ4 && offsets) {
                        continue; // offsets here are no multiples of 8 scales
                    }
                    check_matrix(encode(type, n_rows, n_cols, 512, make_codes(type, n_rows, n_cols, sigma, FILL_NORMAL), offsets), small ? std::vector<int64_t>{ 1, 8 } : all);
                }
            }
        }
        for (const fill_t fill : { FILL_ONE_SYMBOL, FILL_ESCAPES, FILL_UNIFORM, FILL_DRIFT }) {
            for (const int64_t tile_cols : { 128, 1024 }) {
                check_matrix(encode(type, 70, 1024, tile_cols, make_codes(type, 70, 1024, fill == FILL_ESCAPES ? 1 : sigma, fill), false), { 1, 3 });
            }
        }
        if (!small) {
            check_matrix(encode(type, 4096, 4096, 512, make_codes(type, 4096, 4096, sigma, FILL_NORMAL), false), { 1, 4 });
            check_matrix(encode(type, 1000, 14336, 256, make_codes(type, 1000, 14336, sigma, FILL_NORMAL), false), { 1 });
        }
    }
    CHECK(cudaDeviceSynchronize());
    printf("%d checks, %d wrong\n", n_checked, n_wrong);
}

// ---- fast --------------------------------------------------------------------------------------------------------------------------

template <typename Body>
static double seconds_per_call(int n_calls, const Body & body) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    double best = 1e30;
    for (int repeat = 0; repeat < 4; repeat++) { // the first warms up
        CHECK(cudaEventRecord(begin));
        for (int i = 0; i < n_calls; i++) {
            body(i);
        }
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (repeat > 0) {
            best = std::min(best, ms*1e-3/n_calls);
        }
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return best;
}

static void table(FILE * json) {
    // what reading alone gives: a copy within the device
    {
        const size_t n = 512 << 20;
        device_array<uint8_t> a(n), b(n);
        const double s = seconds_per_call(4, [&](int) { CHECK(cudaMemcpyAsync(b.data, a.data, n, cudaMemcpyDeviceToDevice)); });
        fprintf(json, "  \"copy_gb_per_s\": %.0f,\n  \"rows\": [\n", 2*n/s/1e9);
    }
    bool first = true;
    const std::pair<int64_t, int64_t> shapes[] = { { 4096, 14336 }, { 14336, 4096 }, { 4096, 4096 }, { 1024, 4096 }, { 2048, 2048 } };
    for (const ggml_type type : { GGML_TYPE_EQ8, GGML_TYPE_EQ4 }) {
        for (const auto & shape : shapes) {
            const int64_t n_rows = shape.first, n_cols = shape.second;
            const bool main_shape = n_cols == 14336;
            for (const double sigma : type == GGML_TYPE_EQ8 ? std::vector<double>{ 9.5, 3.9, 28.0 } : std::vector<double>{ 1.95, 1.0 }) {
                if (!main_shape && sigma != 9.5 && sigma != 1.95) {
                    continue;
                }
                const std::vector<int8_t> q = make_codes(type, n_rows, n_cols, sigma, FILL_NORMAL);
                for (const int64_t tile_cols : { 1024, 512, 256, 128 }) {
                    const matrix m = encode(type, n_rows, n_cols, tile_cols, q, false);
                    const int n_copies = (int) std::min<size_t>(64, (512 << 20)/m.payload.size() + 1);
                    std::vector<device_array<uint8_t>> copies;
                    for (int i = 0; i < n_copies; i++) {
                        copies.emplace_back(m.payload);
                    }
                    const auto report = [&](const char * what, int64_t n_columns, int warps, double s) {
                        fprintf(json, "%s    {\"kernel\": \"%s\", \"type\": \"%s\", \"rows\": %lld, \"cols\": %lld, \"bits\": %.3f, \"tile_cols\": %lld, \"columns\": %lld, "
                            "\"warps\": %d, \"us\": %.2f, \"gweights_per_s\": %.1f, \"gb_per_s\": %.1f}",
                            first ? "" : ",\n", what, type == GGML_TYPE_EQ8 ? "EQ8" : "EQ4", (long long) n_rows, (long long) n_cols, m.bits, (long long) tile_cols,
                            (long long) n_columns, warps, s*1e6, n_rows*n_cols/s/1e9, m.payload.size()/s/1e9);
                        fflush(json);
                        first = false;
                        printf("%-8s %s %5lld x %5lld %5.2f bits, tiles of %4lld, %lld columns, %2d warps: %8.2f us %7.1f Gweights/s %7.1f GB/s\n", what,
                            type == GGML_TYPE_EQ8 ? "EQ8" : "EQ4", (long long) n_rows, (long long) n_cols, m.bits, (long long) tile_cols, (long long) n_columns, warps,
                            s*1e6, n_rows*n_cols/s/1e9, m.payload.size()/s/1e9);
                    };
                    const std::vector<float> x(8*n_cols, 0.5f);
                    const entropy_tuning usual = tuning;
                    for (const int warps : { 16, 8, 4 }) {
                        if (warps != 16 && !main_shape && n_cols/tile_cols < 8) {
                            continue;
                        }
                        tuning.mat_vec_warps = warps;
                        for (const int64_t n_columns : { 1, 2, 4, 8 }) {
                            if (n_columns > 1 && (warps != 16 || tile_cols != 512)) {
                                continue;
                            }
                            const vectors v(m, n_columns, x);
                            report("mat_vec", n_columns, warps, seconds_per_call(3*n_copies, [&](int i) { mat_vec(m, copies[i%n_copies].data, v); }));
                        }
                    }
                    tuning = usual;
                    if (tile_cols == 512) {
                        device_array<uint8_t> rows(n_rows*n_cols*2);
                        report("to_f16", 0, tuning.rows_warps, seconds_per_call(n_copies, [&](int i) {
                            decode(m, copies[i%n_copies].data, GGML_TYPE_F16, n_cols*2, rows.data);
                        }));
                        const ggml_type block = type == GGML_TYPE_EQ8 ? GGML_TYPE_Q8_0 : GGML_TYPE_Q4_0;
                        report(type == GGML_TYPE_EQ8 ? "to_q8_0" : "to_q4_0", 0, tuning.rows_warps, seconds_per_call(n_copies, [&](int i) {
                            decode(m, copies[i%n_copies].data, block, n_cols/32*(type == GGML_TYPE_EQ8 ? 34 : 18), rows.data);
                        }));
                    }
                }
            }
        }
    }
    fprintf(json, "\n  ]\n");
}

int main(int argc, char ** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (what != "check" && what != "small" && what != "table") {
        fprintf(stderr, "usage: harness check|small|table [JSON]\n");
        return 2;
    }
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    tuning = entropy_tuning_of(device.major*100 + device.minor*10, device.sharedMemPerBlockOptin);
    printf("%s, sm_%d%d, %d SMs, %zu KB of shared memory a block\n", device.name, device.major, device.minor, device.multiProcessorCount, device.sharedMemPerBlockOptin/1024);
    if (what != "table") {
        check(what == "small");
        return n_wrong == 0 ? 0 : 1;
    }
    FILE * json = argc > 2 ? fopen(argv[2], "w") : nullptr;
    if (json == nullptr) {
        fprintf(stderr, "table needs a file to write\n");
        return 2;
    }
    fprintf(json, "{\n  \"device\": \"%s\",\n  \"sms\": %d,\n", device.name, device.multiProcessorCount);
    table(json);
    fprintf(json, "}\n");
    return fclose(json) == 0 ? 0 : 1;
}
