// SPDX-License-Identifier: MIT
//
// How entropy-coded tensors come to a device that is not the CPU, without such a device: a stand-in that has memory of its own kind and
// lets the CPU compute. It takes weights in the device layout alone, as the kernels of CUDA do, and stops the program at anything else.
//
//   test-entropy-device CODED.gguf PLAIN.gguf SCRATCH.gguf
//
// PLAIN holds the same weights in the stock types they decode to; SCRATCH is written. In fused mode the logits must be those of fused mode
// on the CPU, bit by bit, in every way to load and with a part of the layers on the CPU, whose weights the stand-in would like to have for
// every op (op offload); in load mode those of PLAIN. Then files whose headers promise another size than the device layout has.
//
// Limits: what a GPU does with the bytes is tested in tests/cuda of EntroLLM-GGUF.

#include "llama.h"
#include "ggml-backend.h"
#include "gguf.h"

#include "../ggml/src/ggml-backend-impl.h"
#include "../ggml/src/ggml-entropy-lanes.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

static int n_passed = 0;
static int n_failed = 0;

static void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAILED: %s\n", what.c_str());
    }
    (ok ? n_passed : n_failed)++;
}

static std::string said; // in the log since the last model

// ---- the stand-in ------------------------------------------------------------------------------------------------------------------

static constexpr std::align_val_t ALIGNMENT { 64 };

static ggml_backend_device      stand_in;
static ggml_backend_buffer_type stand_in_buft;

static int64_t n_coded_ops = 0; // computed on weights in the device layout

static ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = [](ggml_backend_buffer_t buffer) { ::operator delete(buffer->context, ALIGNMENT); };
    iface.get_base      = [](ggml_backend_buffer_t buffer) { return buffer->context; };
    iface.memset_tensor = [](ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t n) {
        memset((char *) tensor->data + offset, value, n);
    };
    iface.set_tensor    = [](ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t n) {
        GGML_ASSERT(offset + n <= ggml_nbytes(tensor));
        memcpy((char *) tensor->data + offset, data, n);
    };
    iface.get_tensor    = [](ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t n) {
        memcpy(data, (const char *) tensor->data + offset, n);
    };
    iface.clear         = [](ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); };
    return ggml_backend_buffer_init(buft, iface, ::operator new(size, ALIGNMENT), size);
}

// Weights that are not as promised end the program: a GPU would read them.
static void check_weight(const ggml_tensor * w) {
    ggml_entropy_lanes_header header;
    for (int64_t i = 0; i < w->ne[2]; i++) {
        const char * slab = (const char *) w->data + i*w->nb[2];
        memcpy(&header, slab, sizeof(header));
        GGML_ASSERT(ggml_entropy_is_lanes(slab));
        GGML_ASSERT(header.slab_size == w->nb[2] && header.n_cols == w->ne[0] && header.n_rows == w->ne[1] && header.n_slabs == w->ne[2]);
    }
    n_coded_ops++;
}

static ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * w = ggml_graph_node(graph, i)->src[0];
        if (w != nullptr && ggml_entropy_is_type(w->type)) {
            check_weight(w);
        }
    }
    return ggml_backend_graph_compute((ggml_backend_t) backend->context, graph);
}

static ggml_backend_t init_backend(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = { 0x45, 0x51 };
    ggml_backend_i iface = {};
    iface.get_name      = [](ggml_backend_t) { return "StandIn"; };
    iface.free          = [](ggml_backend_t backend) {
        ggml_backend_free((ggml_backend_t) backend->context);
        delete backend;
    };
    iface.graph_compute = graph_compute;
    return new ggml_backend { &guid, iface, device, ggml_backend_dev_init(cpu(), nullptr) };
}

// As ggml_backend_entropy_supports_op of CUDA.
static bool supports_entropy_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const ggml_tensor * w = op->src[0];
    if (op->op == GGML_OP_NONE) {
        return true;
    }
    return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID || op->op == GGML_OP_GET_ROWS)
        && ggml_entropy_is_type(w->type) && (w->buffer == nullptr || !ggml_backend_buffer_is_host(w->buffer));
}

static void register_stand_in() {
    static ggml_backend_reg reg = {};
    reg.api_version            = GGML_BACKEND_API_VERSION;
    reg.iface.get_name         = [](ggml_backend_reg_t) { return "StandIn"; };
    reg.iface.get_device_count = [](ggml_backend_reg_t) -> size_t { return 1; };
    reg.iface.get_device       = [](ggml_backend_reg_t, size_t) { return &stand_in; };
    reg.iface.get_proc_address = [](ggml_backend_reg_t, const char * name) -> void * {
        return strcmp(name, "ggml_backend_entropy_supports_op") == 0 ? (void *) supports_entropy_op : nullptr;
    };

    stand_in_buft.device              = &stand_in;
    stand_in_buft.iface.get_name      = [](ggml_backend_buffer_type_t) { return "StandIn"; };
    stand_in_buft.iface.alloc_buffer  = alloc_buffer;
    stand_in_buft.iface.get_alignment = [](ggml_backend_buffer_type_t) { return (size_t) ALIGNMENT; };

    stand_in.reg                   = &reg;
    stand_in.iface.get_name        = [](ggml_backend_dev_t) { return "StandIn0"; };
    stand_in.iface.get_description = [](ggml_backend_dev_t) { return "stand-in for a GPU"; };
    stand_in.iface.get_memory      = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 64 << 30; };
    stand_in.iface.get_type        = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    stand_in.iface.get_props       = [](ggml_backend_dev_t device, ggml_backend_dev_props * props) {
        *props = {};
        props->name        = device->iface.get_name(device);
        props->description = device->iface.get_description(device);
        props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
        device->iface.get_memory(device, &props->memory_free, &props->memory_total);
    };
    stand_in.iface.init_backend    = init_backend;
    stand_in.iface.get_buffer_type = [](ggml_backend_dev_t) -> ggml_backend_buffer_type_t { return &stand_in_buft; };
    stand_in.iface.supports_op     = [](ggml_backend_dev_t, const ggml_tensor * op) { return ggml_backend_dev_supports_op(cpu(), op); };
    stand_in.iface.supports_buft   = [](ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return buft == &stand_in_buft; };
    stand_in.iface.offload_op      = [](ggml_backend_dev_t, const ggml_tensor *) { return true; };
    ggml_backend_register(&reg);
}

// ---- models ------------------------------------------------------------------------------------------------------------------------

static void set_mode(const char * value) {
#ifdef _WIN32
    _putenv_s("GGML_ENTROPY_MODE", value);
#else
    setenv("GGML_ENTROPY_MODE", value, 1);
#endif
}

static llama_model * load(const char * path, const llama_model_params & params) {
    said.clear();
    n_coded_ops = 0;
    return llama_model_load_from_file(path, params);
}

// Logits of the last token of a prompt, then of a single token.
static std::vector<float> logits_of(const char * path, const llama_model_params & params) {
    llama_model * model = load(path, params);
    if (model == nullptr) {
        return {};
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx     = 64;
    cparams.n_batch   = 64;
    cparams.n_threads = cparams.n_threads_batch = 2;
    llama_context * ctx = llama_init_from_model(model, cparams);
    std::vector<float> out;
    for (const int n_tokens : { 40, 1 }) {
        std::vector<llama_token> tokens(n_tokens);
        for (int i = 0; i < n_tokens; i++) {
            tokens[i] = (7 + 131*i) % n_vocab;
        }
        if (ctx == nullptr || llama_decode(ctx, llama_batch_get_one(tokens.data(), n_tokens)) != 0) {
            out.clear();
            break;
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        out.insert(out.end(), logits, logits + n_vocab);
    }
    llama_free(ctx);
    llama_model_free(model);
    return out;
}

static bool same(const std::vector<float> & a, const std::vector<float> & b) {
    return !a.empty() && a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

static double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0.0;
    double power = 0.0;
    for (size_t i = 0; i < a.size() && i < b.size(); i++) {
        error += ((double) a[i] - b[i])*((double) a[i] - b[i]);
        power += (double) b[i]*b[i];
    }
    return a.size() != b.size() || power == 0.0 ? 1.0 : error/power;
}

static bool was_said(const char * what) {
    return said.find(what) != std::string::npos;
}

// A copy of a file in which all matrices of all entropy-coded tensors promise another size of the device layout.
static bool write_with_device_size(const char * from, const char * to, uint64_t (*change)(uint64_t)) {
    FILE * in = fopen(from, "rb");
    std::vector<uint8_t> data;
    uint8_t buf[65536];
    for (size_t n; in != nullptr && (n = fread(buf, 1, sizeof(buf), in)) > 0;) {
        data.insert(data.end(), buf, buf + n);
    }
    if (in != nullptr) {
        fclose(in);
    }
    ggml_context * ctx = nullptr;
    gguf_init_params params = { /*.no_alloc =*/ true, /*.ctx =*/ &ctx };
    gguf_context * gguf = gguf_init_from_file(from, params);
    for (int64_t i = 0; gguf != nullptr && i < gguf_get_n_tensors(gguf); i++) {
        const ggml_tensor * tensor = ggml_get_tensor(ctx, gguf_get_tensor_name(gguf, i));
        for (int64_t slab = 0; ggml_entropy_is_type(tensor->type) && slab < tensor->ne[2]; slab++) {
            uint8_t * at = data.data() + gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i) + slab*tensor->nb[2];
            ggml_entropy_header header;
            memcpy(&header, at, sizeof(header));
            header.device_size = change(header.device_size);
            memcpy(at, &header, sizeof(header));
        }
    }
    gguf_free(gguf);
    ggml_free(ctx);
    FILE * out = fopen(to, "wb");
    const bool ok = out != nullptr && !data.empty() && fwrite(data.data(), 1, data.size(), out) == data.size();
    return out != nullptr && fclose(out) == 0 && ok;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: test-entropy-device CODED.gguf PLAIN.gguf SCRATCH.gguf\n");
        return 1;
    }
    const char * coded   = argv[1];
    const char * plain   = argv[2];
    const char * scratch = argv[3];
    llama_log_set([](ggml_log_level, const char * text, void *) { said += text; }, nullptr);
    register_stand_in();
    llama_backend_init();

    llama_model_params params = llama_model_default_params();
    params.use_extra_bufts = false;

    // all on the CPU: what is right
    ggml_backend_dev_t none[] = { nullptr };
    ggml_backend_dev_t all [] = { &stand_in, nullptr };
    params.devices      = none;
    params.n_gpu_layers = 0;
    set_mode("fused");
    const std::vector<float> fused = logits_of(coded, params);
    check(!fused.empty() && was_said("computed by CPU"), "fused on the CPU");
    set_mode("load");
    const std::vector<float> decoded = logits_of(plain, params);
    check(!decoded.empty(), "stock types on the CPU");

    params.devices = all;
    for (const llama_load_mode mode : { LLAMA_LOAD_MODE_MMAP, LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_DIRECT_IO }) {
        params.load_mode = mode;
        const std::string name = llama_load_mode_name(mode);
        params.n_gpu_layers = 99;
        set_mode("fused");
        check(same(logits_of(coded, params), fused) && n_coded_ops > 0 && was_said(" and StandIn0"), name + ", fused");
        // the embedding is the CPU's, which decodes it if it may: to F16 where there are offsets
        set_mode("auto");
        check(nmse(logits_of(coded, params), fused) < 1e-4 && n_coded_ops > 0 && was_said("computed by StandIn0"), name + ", auto");
        set_mode("fused");
        params.check_tensors = true;
        check(same(logits_of(coded, params), fused) && n_coded_ops > 0, name + ", fused, check_tensors");
        params.check_tensors = false;
        params.n_gpu_layers  = 1;
        check(same(logits_of(coded, params), fused) && n_coded_ops > 0, name + ", a part on the CPU");

        set_mode("load");
        params.n_gpu_layers = 99;
        check(same(logits_of(coded, params), decoded) && n_coded_ops == 0, name + ", load");
    }

    params.load_mode = LLAMA_LOAD_MODE_MMAP;
    check(write_with_device_size(coded, scratch, [](uint64_t size) { return size - 256; }), "scratch file");
    set_mode("fused");
    check(load(scratch, params) == nullptr && was_said("in the layout of the device, for which its header promises"),
        "promises too little");
    set_mode("load");
    check(same(logits_of(scratch, params), decoded), "promises too little, load");
    check(write_with_device_size(coded, scratch, [](uint64_t size) { return size + 4096; }), "scratch file");
    set_mode("fused");
    check(same(logits_of(scratch, params), fused), "promises more than is needed");
    check(write_with_device_size(coded, scratch, [](uint64_t) { return (uint64_t) 1 << 45; }), "scratch file");
    check(load(scratch, params) == nullptr && was_said("impossible section layout"), "promises what no encoder needs");

    // what the memory-fit pass does: no data, nothing mapped
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    params.no_alloc  = true;
    llama_model * model = load(coded, params);
    check(model != nullptr, "no_alloc");
    llama_model_free(model);

    llama_backend_free();
    remove(scratch);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed == 0 ? 0 : 1;
}
