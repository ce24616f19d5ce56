// SPDX-License-Identifier: MIT
//
// The entropy kernels by themselves on a GPU: right first, then fast. Built in a minute with nvcc and the C codec; nothing of llama.cpp's
// CUDA backend is needed. One file, since it is one program that travels.
//
//     harness check            every shape class against the CPU: weights bit-exact, products within a bound; two matrices in a launch,
//                              experts
//     harness small            a few small cases, for compute-sanitizer
//     harness profile          a few products, for Nsight Compute
//     harness table JSON       Gweights/s and GB/s of the mat-vec and of decoding rows, by shape, type, bits and tile_cols
//
// Matrices of the table are copied until they fill 512 MB, and calls take them in turn: one alone would stay in the L2 cache.

#include "entropy/entropy-launch.cuh"
#include "payload.h"

#if !defined(__CUDACC__)
#include "cuda-on-host.h" // tests/cuda: `harness small` on the CPU
#endif

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
static int sm = 0; // as 90

struct gpu_launcher {
    template <typename Args>
    void operator()(void (*kernel)(Args), dim3 grid, int n_threads, int n_shared, const Args & args) const {
#if defined(__CUDACC__)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) tuning.shared_size));
        kernel<<<grid, n_threads, n_shared>>>(args);
        CHECK(cudaGetLastError());
#else
        simt::launch(kernel, grid, (uint32_t) n_threads, (size_t) n_shared, args);
#endif
    }

    // As ggml-cuda does; GGML_CUDA_PDL=0 turns it off there, too.
    template <typename Args>
    void early(void (*kernel)(Args), dim3 grid, int n_threads, int n_shared, const Args & args) const {
#if defined(__CUDACC__)
        static const bool usual = getenv("GGML_CUDA_PDL") != nullptr && atoi(getenv("GGML_CUDA_PDL")) == 0;
        if (!usual && sm >= 90) {
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) tuning.shared_size));
            cudaLaunchAttribute attribute;
            attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attribute.val.programmaticStreamSerializationAllowed = 1;
            cudaLaunchConfig_t config = {};
            config.gridDim          = grid;
            config.blockDim         = dim3(n_threads);
            config.dynamicSmemBytes = n_shared;
            config.attrs            = &attribute;
            config.numAttrs         = 1;
            CHECK(cudaLaunchKernelEx(&config, kernel, args));
            return;
        }
#endif
        operator()(kernel, grid, n_threads, n_shared, args);
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

    // All bits set, floats that are no numbers: what a kernel forgets to write shows.
    void forget() { CHECK(cudaMemset(data, 0xFF, size*sizeof(T))); }

    std::vector<T> host() const {
        std::vector<T> to(size);
        CHECK(cudaMemcpy(to.data(), data, size*sizeof(T), cudaMemcpyDeviceToHost));
        return to;
    }
};

struct matrix {
    ggml_type type;
    int64_t   n_rows, n_cols;
    std::vector<uint8_t> payload; // in the device layout
    std::vector<uint8_t> planes;  // as in a file, to know what is right; empty where only speed is measured
    double    bits;               // a weight in the device layout, container included
};

static matrix encode(
        ggml_type type, int64_t n_rows, int64_t n_cols, int64_t tile_cols, const std::vector<int8_t> & q, bool offsets,
        bool with_planes = true) {
    const coded_matrix coded(type, n_rows, n_cols, tile_cols, q, offsets);
    matrix m = { type, n_rows, n_cols, coded.lanes(), {}, 0 };
    if (with_planes) {
        m.planes = coded.planes();
    }
    m.bits = 8.0*m.payload.size()/n_rows/n_cols;
    return m;
}

// Rows as the codec decodes them.
static std::vector<uint8_t> decoded(const matrix & m, ggml_type type, size_t row_size) {
    ggml_entropy_view view;
    require(ggml_entropy_validate_slab(m.planes.data(), m.planes.size(), &view), "validate");
    std::vector<uint8_t> rows(m.n_rows*row_size);
    require(ggml_entropy_decode_groups_plain(&view, 0, view.n_groups, type, rows.data()), "decode");
    return rows;
}

static std::vector<float> weights_of(const matrix & m) {
    const std::vector<uint8_t> rows = decoded(m, GGML_TYPE_F32, m.n_cols*sizeof(float));
    std::vector<float> w(m.n_rows*m.n_cols);
    std::memcpy(w.data(), rows.data(), rows.size());
    return w;
}

struct vectors {
    device_array<float>   x, y;
    device_array<entropy_block> blocks;
    int64_t n_columns;

    vectors(const matrix & m, int64_t n_columns, const std::vector<float> & x) :
        x(x), y(n_columns*m.n_rows), blocks(entropy_columns::n_blocks(n_columns, m.n_cols)), n_columns(n_columns) {}
};

// One launch: a matrix or two of the same type; with ids the experts of each, `stride` bytes apart. All pointers are the device's.
struct product {
    ggml_type       type;
    int64_t         n_cols;
    const uint8_t * payload[2];
    int64_t         stride[2], n_rows[2]; // n_rows[1] = 0: one matrix
    float         * y[2];                 // [n2][n1 or n_slots][n_rows]
    const float   * x;                    // [n2][n1][n_cols]
    int64_t         n1, n2;
    const int32_t * ids;                  // [n2][n_slots] or nullptr
    int64_t         n_slots, n_experts;
    entropy_block * blocks;
};

template <ggml_type TYPE>
static void run_mat_vec(const product & p) {
    const bool two = p.n_rows[1] > 0;
    const entropy_columns columns = { p.blocks, p.n1*p.n2, (int) p.n_cols };
    const entropy_routes routes = { p.ids, 1, p.n_slots, (int) p.n_slots, (int) p.n_experts };
    entropy_launch_quantize<TYPE>(gpu_launcher(), {
        { p.payload[0], p.payload[two] }, { p.stride[0], p.stride[two] }, routes, { p.x, p.n1, p.n2, p.n_cols, p.n_cols*p.n1, 0 }, columns,
    });
    entropy_mat_vec_args args = {};
    for (int i = 0; i < 2; i++) {
        const int from = two ? i : 0;
        args.payload[i]     = p.payload[from];
        args.slab_stride[i] = p.stride[from];
        args.y[i]           = p.y[from];
        args.y1[i]          = p.n_rows[from];
        args.y2[i]          = p.ids != nullptr ? p.n_rows[from] : p.n_rows[from]*p.n1;
        args.y3[i]          = p.ids != nullptr ? p.n_rows[from]*p.n_slots : 0;
    }
    args.columns = columns;
    args.n1      = p.n1;
    args.n2      = p.n2;
    args.planes_per_slab = 1;
    if (p.ids != nullptr) {
        args.ids       = p.ids;
        args.ids_s0    = 1;
        args.ids_s1    = p.n_slots;
        args.n_experts = (int) p.n_experts;
        entropy_launch_mat_vec<TYPE>(gpu_launcher(), args, 1, p.n_rows, p.n_slots, p.n2, tuning);
    } else {
        entropy_launch_mat_vec<TYPE>(gpu_launcher(), args, (int) p.n1, p.n_rows, p.n2, 1, tuning);
    }
}

static void mat_vec(const product & p) {
    if (p.type == GGML_TYPE_EQ8) {
        run_mat_vec<GGML_TYPE_EQ8>(p);
    } else {
        run_mat_vec<GGML_TYPE_EQ4>(p);
    }
}

static void mat_vec(const matrix & m, const uint8_t * payload, const vectors & v) {
    product p = {};
    p.type       = m.type;
    p.n_cols     = m.n_cols;
    p.payload[0] = payload;
    p.n_rows[0]  = m.n_rows;
    p.y[0]       = v.y.data;
    p.x          = v.x.data;
    p.n1         = v.n_columns;
    p.n2         = 1;
    p.blocks     = v.blocks.data;
    mat_vec(p);
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

// Columns whose quantization loses nothing, integers times a power of two: sums may only round.
static std::vector<float> exact_columns(int64_t n_columns, int64_t n_cols) {
    std::vector<float> x(n_columns*n_cols);
    std::mt19937 generator((uint32_t) n_columns);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = (i%32 == 0 ? 127 : (int) (generator()%255) - 127)*0.0078125f;
    }
    return x;
}

// Of a column of results, relative to the sum of absolute products; infinite if one is no number.
static double error_of(const std::vector<float> & w, int64_t n_rows, int64_t n_cols, const float * x, const float * y) {
    double worst = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        double sum = 0, size = 1e-30;
        for (int64_t k = 0; k < n_cols; k++) {
            const double product = (double) w[r*n_cols + k]*x[k];
            sum  += product;
            size += std::fabs(product);
        }
        const double error = std::fabs(y[r] - sum)/size;
        worst = std::max(worst, std::isnan(error) ? INFINITY : error);
    }
    return worst;
}

static constexpr double BOUND = 2e-6; // what f32 rounds

static void check_matrix(const matrix & m, const std::vector<int64_t> & all_columns) {
    const std::vector<float> w = weights_of(m);
    const device_array<uint8_t> payload(m.payload);
    ggml_entropy_header header;
    std::memcpy(&header, m.planes.data(), sizeof(header));

    for (const int64_t n_columns : all_columns) {
        const std::vector<float> x = exact_columns(n_columns, m.n_cols);
        vectors v(m, n_columns, x);
        v.y.forget();
        v.blocks.forget();
        mat_vec(m, payload.data, v);
        const std::vector<float> y = v.y.host();
        double worst = 0;
        for (int64_t c = 0; c < n_columns; c++) {
            worst = std::max(worst, error_of(w, m.n_rows, m.n_cols, x.data() + c*m.n_cols, y.data() + c*m.n_rows));
        }
        expect(worst <= BOUND, m, "products", worst);
    }

    const ggml_type plain = ggml_entropy_plain_type(&header);
    const size_t row_size = plain == GGML_TYPE_F16 ? m.n_cols*2 : m.n_cols/32*(plain == GGML_TYPE_Q8_0 ? 34 : plain == GGML_TYPE_Q4_0 ? 18 : 20);
    device_array<uint8_t> rows(row_size*m.n_rows);
    decode(m, payload.data, plain, row_size, rows.data);
    expect(rows.host() == decoded(m, plain, row_size), m, "rows of the stock type", 0);

    const std::vector<int32_t> ids = { (int32_t) m.n_rows - 1, 0, (int32_t) m.n_rows/2 };
    const device_array<int32_t> ids_dev(ids);
    device_array<float> got(ids.size()*m.n_cols);
    const entropy_get_rows_args args = { payload.data, 0, ids_dev.data, 1, 0, (int) m.n_rows, got.data, m.n_cols, 0 };
    if (m.type == GGML_TYPE_EQ8) {
        entropy_launch_get_rows<GGML_TYPE_EQ8>(gpu_launcher(), args, ids.size(), m.n_cols, 1, tuning);
    } else {
        entropy_launch_get_rows<GGML_TYPE_EQ4>(gpu_launcher(), args, ids.size(), m.n_cols, 1, tuning);
    }
    const std::vector<float> result = got.host();
    bool same = true;
    for (size_t i = 0; i < ids.size(); i++) {
        same = same && std::memcmp(result.data() + i*m.n_cols, w.data() + ids[i]*m.n_cols, m.n_cols*sizeof(float)) == 0;
    }
    expect(same, m, "single rows", 0);
}

// Experts of one shape, or one matrix, on the device; and their weights.
struct operand {
    std::vector<matrix> slabs;
    std::vector<std::vector<float>> w;
    int64_t stride = 0;
    std::unique_ptr<device_array<uint8_t>> payload;

    operand(ggml_type type, int64_t n_rows, int64_t n_cols, int64_t n_slabs, double sigma, bool offsets) {
        for (int64_t i = 0; i < n_slabs; i++) {
            // another sigma is another table and other codes
            slabs.push_back(encode(type, n_rows, n_cols, 256, make_codes(type, n_rows, n_cols, sigma*(1 + 0.1*i), FILL_NORMAL), offsets));
            w.push_back(weights_of(slabs.back()));
            stride = std::max(stride, (int64_t) slabs.back().payload.size());
        }
        std::vector<uint8_t> all(stride*n_slabs);
        for (int64_t i = 0; i < n_slabs; i++) {
            std::memcpy(all.data() + i*stride, slabs[i].payload.data(), slabs[i].payload.size());
        }
        payload = std::make_unique<device_array<uint8_t>>(all);
    }
};

// Gate and up: two matrices of different numbers of rows in one launch. n_slots: experts of a token (MUL_MAT_ID), n columns are tokens; 0:
// MUL_MAT.
static void check_launch(const operand & a, const operand * b, int64_t n, int64_t n_slots) {
    const int64_t n_cols = a.slabs[0].n_cols, n_experts = (int64_t) a.slabs.size();
    const int64_t n_y = n*std::max<int64_t>(n_slots, 1); // columns of results
    const std::vector<float> x = exact_columns(n, n_cols);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n*n_slots; i++) {
        ids.push_back((int32_t) ((i*3 + i/n_experts) % n_experts));
    }
    const device_array<float>   x_dev(x);
    const device_array<int32_t> ids_dev(ids);
    device_array<entropy_block> blocks(entropy_columns::n_blocks(n, n_cols));
    blocks.forget();
    product p = {};
    p.type   = a.slabs[0].type;
    p.n_cols = n_cols;
    p.x      = x_dev.data;
    p.n1     = n_slots > 0 ? 1 : n;
    p.n2     = n_slots > 0 ? n : 1;
    p.ids    = n_slots > 0 ? ids_dev.data : nullptr;
    p.n_slots   = n_slots;
    p.n_experts = n_experts;
    p.blocks    = blocks.data;
    const operand * both[2] = { &a, b };
    std::vector<device_array<float>> y;
    for (int i = 0; i < (b != nullptr ? 2 : 1); i++) {
        y.emplace_back(n_y*both[i]->slabs[0].n_rows);
        y.back().forget();
        p.payload[i] = both[i]->payload->data;
        p.stride[i]  = both[i]->stride;
        p.n_rows[i]  = both[i]->slabs[0].n_rows;
        p.y[i]       = y.back().data;
    }
    mat_vec(p);
    for (size_t i = 0; i < y.size(); i++) {
        const std::vector<float> got = y[i].host();
        const int64_t n_rows = p.n_rows[i];
        double worst = 0;
        for (int64_t c = 0; c < n_y; c++) {
            const int64_t column = n_slots > 0 ? c/n_slots : c;
            const size_t  slab   = n_slots > 0 ? ids[c] : 0;
            worst = std::max(worst, error_of(both[i]->w[slab], n_rows, n_cols, x.data() + column*n_cols, got.data() + c*n_rows));
        }
        expect(worst <= BOUND, both[i]->slabs[0], n_slots > 0 ? b != nullptr ? "experts of two" : "experts" : "two matrices", worst);
    }
}

static void check_launches(ggml_type type, double sigma, const std::vector<int64_t> & all) {
    for (const bool offsets : { false, true }) {
        const operand gate(type, 33, 576, 1, sigma, false), up(type, 100, 576, 1, sigma/2, offsets);
        const operand gates(type, 64, 288, 4, sigma, offsets), ups(type, 33, 288, 4, sigma/2, offsets);
        for (const int64_t n : all) {
            check_launch(gate, &up, n, 0);
            check_launch(up, &gate, n, 0);
            check_launch(gates, nullptr, n, 2);
            check_launch(gates, &ups, n, 2);
        }
    }
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
                    check_matrix(encode(type, n_rows, n_cols, 512, make_codes(type, n_rows, n_cols, sigma, FILL_NORMAL), offsets),
                        small ? std::vector<int64_t>{ 1, 8 } : all);
                }
            }
        }
        for (const fill_t fill : { FILL_ONE_SYMBOL, FILL_ESCAPES, FILL_UNIFORM, FILL_DRIFT }) {
            for (const int64_t tile_cols : { 128, 1024 }) {
                check_matrix(encode(type, 70, 1024, tile_cols, make_codes(type, 70, 1024, fill == FILL_ESCAPES ? 1 : sigma, fill), false), { 1, 3 });
            }
        }
        check_launches(type, sigma, small ? std::vector<int64_t>{ 1, 8 } : all);
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
                for (const int64_t tile_cols : { 512, 256, 128 }) {
                    const matrix m = encode(type, n_rows, n_cols, tile_cols, q, false, false);
                    const int n_copies = (int) std::min<size_t>(64, (512 << 20)/m.payload.size() + 1);
                    std::vector<device_array<uint8_t>> copies;
                    for (int i = 0; i < n_copies; i++) {
                        copies.emplace_back(m.payload);
                    }
                    const auto report = [&](const char * what, int64_t n_columns, int warps, double s) {
                        const char * name = type == GGML_TYPE_EQ8 ? "EQ8" : "EQ4";
                        const double gweights = n_rows*n_cols/s/1e9, gb = m.payload.size()/s/1e9;
                        fprintf(json,
                            "%s    {\"kernel\": \"%s\", \"type\": \"%s\", \"rows\": %lld, \"cols\": %lld, \"bits\": %.3f, \"tile_cols\": %lld, "
                            "\"columns\": %lld, \"warps\": %d, \"us\": %.2f, \"gweights_per_s\": %.1f, \"gb_per_s\": %.1f}",
                            first ? "" : ",\n", what, name, (long long) n_rows, (long long) n_cols, m.bits, (long long) tile_cols,
                            (long long) n_columns, warps, s*1e6, gweights, gb);
                        fflush(json);
                        first = false;
                        printf("%-8s %s %5lld x %5lld %5.2f bits, tiles of %4lld, %lld columns, %2d warps: "
                            "%8.2f us %7.1f Gweights/s %7.1f GB/s\n",
                            what, name, (long long) n_rows, (long long) n_cols, m.bits, (long long) tile_cols, (long long) n_columns, warps,
                            s*1e6, gweights, gb);
                    };
                    const std::vector<float> x(8*n_cols, 0.5f);
                    const entropy_tuning usual = tuning;
                    for (const int warps : { 32, 16, 8 }) {
                        if (warps > 8 && n_cols/tile_cols <= warps/2) {
                            continue;
                        }
                        tuning.mat_vec_warps = warps;
                        tuning.tile_cols     = (int) tile_cols;
                        tuning.n_sm          = 0; // as many warps as told
                        for (const int64_t n_columns : { 1, 2, 4, 8 }) {
                            if (n_columns > 1 && (warps != 16 || (tile_cols != 512 && tile_cols != 128))) {
                                continue;
                            }
                            const vectors v(m, n_columns, x);
                            report("mat_vec", n_columns, warps, seconds_per_call(3*n_copies, [&](int i) { mat_vec(m, copies[i%n_copies].data, v); }));
                        }
                    }
                    tuning = usual;
                    if (tile_cols == 512 || tile_cols == 128) {
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

// A large matrix, one of many rows, a small one; one column, as while generating.
static void profile() {
    for (const auto & [n_rows, n_cols] : { std::pair<int64_t, int64_t>{ 4096, 14336 }, { 14336, 4096 }, { 1024, 4096 } }) {
        const matrix m = encode(GGML_TYPE_EQ8, n_rows, n_cols, ggml_entropy_lanes_default_tile_cols(n_rows, n_cols),
            make_codes(GGML_TYPE_EQ8, n_rows, n_cols, 9.5, FILL_NORMAL), false, false);
        const device_array<uint8_t> payload(m.payload);
        const vectors v(m, 1, std::vector<float>(n_cols, 0.5f));
        mat_vec(m, payload.data, v);
        CHECK(cudaDeviceSynchronize());
    }
}

int main(int argc, char ** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (what != "check" && what != "small" && what != "profile" && what != "table") {
        fprintf(stderr, "usage: harness check|small|profile|table [JSON]\n");
        return 2;
    }
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    sm     = device.major*10 + device.minor;
    tuning = entropy_tuning_of(device.major*100 + device.minor*10, device.sharedMemPerBlockOptin, device.multiProcessorCount);
    printf("%s, sm_%d%d, %d SMs, %zu KB of shared memory a block\n", device.name, device.major, device.minor, device.multiProcessorCount,
        device.sharedMemPerBlockOptin/1024);
    if (what == "profile") {
        profile();
        return 0;
    }
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
