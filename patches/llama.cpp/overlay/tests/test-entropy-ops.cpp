// SPDX-License-Identifier: MIT
//
// Runs ops with entropy-coded weights on the CPU backend, for whoever knows the right results (tests/cross/test_fused_ops.py).
//
//   test-entropy-ops CASES.gguf OUT.f32 [N_THREADS...]
//   test-entropy-ops --levels            the kernel levels that can run here, best first, a line each
//   test-entropy-ops --speed CASES.gguf  microseconds of every case with one thread, the best of 30 runs, a line each
//
// CASES.gguf holds for case i = 0, 1, ... the tensors "i.w" (weights, any type), "i.x" (F32: MUL_MAT, or MUL_MAT_ID if there is "i.ids"
// too) or "i.ids" alone (I32: GET_ROWS). OUT.f32 receives the results one after the other, as floats. Every case runs with each number of
// threads (default 1) and twice with each; all results must be equal, bit by bit: a group of rows is one thread's work whoever gets it.
// GGML_ENTROPY_KERNEL selects the kernel level; its name is printed.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "gguf.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

[[noreturn]] static void fail(const std::string & what) {
    fprintf(stderr, "test-entropy-ops: %s\n", what.c_str());
    exit(1);
}

struct case_file {
    ggml_context        * ctx  = nullptr;
    gguf_context        * gguf = nullptr;
    ggml_backend_buffer_t buffer = nullptr;

    case_file(const char * path, ggml_backend_t backend) {
        gguf_init_params params = { /*.no_alloc =*/ true, /*.ctx =*/ &ctx };
        gguf = gguf_init_from_file(path, params);
        if (gguf == nullptr) {
            fail(std::string(path) + ": cannot be read");
        }
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        FILE * f = fopen(path, "rb");
        std::vector<char> data;
        for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
            ggml_tensor * tensor = ggml_get_tensor(ctx, gguf_get_tensor_name(gguf, i));
            data.resize(ggml_nbytes(tensor));
            if (fseek(f, (long) (gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i)), SEEK_SET) != 0
                    || fread(data.data(), 1, data.size(), f) != data.size()) {
                fail(std::string(path) + ": truncated");
            }
            ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
        }
        fclose(f);
    }

    ~case_file() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
        gguf_free(gguf);
    }

    ggml_tensor * find(int i, const char * part) const {
        return ggml_get_tensor(ctx, (std::to_string(i) + "." + part).c_str());
    }
};

// The graph of one case.
struct case_graph {
    ggml_context * ctx;
    ggml_tensor  * out;
    ggml_cgraph  * graph;
    ggml_gallocr_t alloc;
    ggml_backend_t backend;
    int            i;

    case_graph(const case_file & cases, int i, ggml_backend_t backend) : backend(backend), i(i) {
        ggml_init_params params = { ggml_tensor_overhead()*8 + ggml_graph_overhead(), nullptr, /*.no_alloc =*/ true };
        ctx = ggml_init(params);
        ggml_tensor * w   = cases.find(i, "w");
        ggml_tensor * x   = cases.find(i, "x");
        ggml_tensor * ids = cases.find(i, "ids");
        out = x == nullptr ? ggml_get_rows(ctx, w, ids) : ids == nullptr ? ggml_mul_mat(ctx, w, x) : ggml_mul_mat_id(ctx, w, x, ids);
        if (!ggml_backend_supports_op(backend, out)) {
            fail("case " + std::to_string(i) + ": the backend does not support it");
        }
        graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, out);
        alloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
        if (!ggml_gallocr_alloc_graph(alloc, graph)) {
            fail("case " + std::to_string(i) + ": out of memory");
        }
    }

    ~case_graph() {
        ggml_gallocr_free(alloc);
        ggml_free(ctx);
    }

    void compute() {
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            fail("case " + std::to_string(i) + ": cannot be computed");
        }
    }

    std::vector<float> result() const {
        std::vector<float> values(ggml_nelements(out));
        ggml_backend_tensor_get(out, values.data(), 0, ggml_nbytes(out));
        return values;
    }
};

static void print_speeds(const case_file & cases, ggml_backend_t backend) {
    for (int i = 0; cases.find(i, "w") != nullptr; i++) {
        case_graph graph(cases, i, backend);
        int64_t best = INT64_MAX;
        for (int repeat = 0; repeat < 30; repeat++) {
            const int64_t started = ggml_time_us();
            graph.compute();
            best = std::min(best, ggml_time_us() - started);
        }
        printf("%lld\n", (long long) best);
    }
}

int main(int argc, char ** argv) {
    ggml_backend_load_all(); // where backends are libraries of their own
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg    = ggml_backend_dev_backend_reg(device);
    if (argc == 2 && strcmp(argv[1], "--levels") == 0) {
        std::istringstream names(((const char * (*)()) ggml_backend_reg_get_proc_address(reg, "ggml_backend_entropy_kernels"))());
        for (std::string name; names >> name;) {
            printf("%s\n", name.c_str());
        }
        return 0;
    }
    if (argc < 3) {
        fprintf(stderr, "usage: %s CASES.gguf OUT.f32 [N_THREADS...] | --levels | --speed CASES.gguf\n", argv[0]);
        return 1;
    }
    ggml_backend_t     cpu    = ggml_backend_dev_init(device, nullptr);
    const auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    const auto kernel = (const char * (*)()) ggml_backend_reg_get_proc_address(reg, "ggml_backend_entropy_kernel");

    if (strcmp(argv[1], "--speed") == 0) {
        set_n_threads(cpu, 1);
        print_speeds(case_file(argv[2], cpu), cpu);
        ggml_backend_free(cpu);
        return 0;
    }

    std::vector<int> thread_counts;
    for (int i = 3; i < argc; i++) {
        thread_counts.push_back(atoi(argv[i]));
    }
    if (thread_counts.empty()) {
        thread_counts.push_back(1);
    }

    const case_file cases(argv[1], cpu);
    FILE * out = fopen(argv[2], "wb");
    if (out == nullptr) {
        fail(std::string(argv[2]) + ": cannot be written");
    }
    int n_cases = 0;
    for (; cases.find(n_cases, "w") != nullptr; n_cases++) {
        std::vector<float> first;
        for (const int n_threads : thread_counts) {
            set_n_threads(cpu, n_threads);
            for (int repeat = 0; repeat < 2; repeat++) {
                case_graph graph(cases, n_cases, cpu);
                graph.compute();
                const std::vector<float> result = graph.result();
                if (first.empty()) {
                    first = result;
                } else if (memcmp(first.data(), result.data(), first.size()*sizeof(float)) != 0) {
                    fail("case " + std::to_string(n_cases) + ": another result with " + std::to_string(n_threads) + " threads");
                }
            }
        }
        fwrite(first.data(), sizeof(float), first.size(), out);
    }
    if (fclose(out) != 0 || n_cases == 0) {
        fail("nothing was written");
    }
    ggml_backend_free(cpu);
    printf("kernel %s, %d cases\n", kernel(), n_cases);
    return 0;
}
