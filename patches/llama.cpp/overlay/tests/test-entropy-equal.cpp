// SPDX-License-Identifier: MIT
//
// Load mode computes what the stock types compute: compare a GGUF with entropy-coded tensors with one that holds the same weights in the
// stock types they decode to (`entrollm decode` makes it). And fused mode computes the same however the file is loaded, and nearly what the
// stock types compute: MAX_NMSE bounds the difference, which comes from sums in another order and, with offsets, from finer activations.
//
//   test-entropy-equal [--fused] CODED.gguf PLAIN.gguf [MAX_NMSE]      --fused: that part only
//
// In load mode the decoded bytes are the same, so the same kernels run and the logits must be bit-identical: for a prompt and for single
// tokens, in every way to load (mmap, read, mlock, direct I/O, FILE *), with and without repacking. Then the switch entropy.mode: what it
// accepts and what it refuses; progress, which must rise to 1 and count bytes of the file; and cancelling.
//
// Limits: CPU only. Thread counts are the same on both sides, since the order of sums may depend on them.

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
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

using loader = std::function<llama_model * (const char * path, llama_model_params params)>;

// Logits of the last token of a prompt, then of a few single tokens.
static std::vector<float> compute_logits(llama_model * model) {
    const int n_prompt = 24;
    const int n_single = 4;
    const int n_vocab  = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx     = 64;
    cparams.n_batch   = 64;
    cparams.n_threads = cparams.n_threads_batch = 2;
    llama_context * ctx = llama_init_from_model(model, cparams);
    std::vector<float> out;
    if (ctx == nullptr) {
        return out;
    }
    std::vector<llama_token> tokens(n_prompt);
    for (int i = 0; i < n_prompt; i++) {
        tokens[i] = (7 + 131*i) % n_vocab;
    }
    bool ok = llama_decode(ctx, llama_batch_get_one(tokens.data(), n_prompt)) == 0;
    for (int i = 0; ok && i <= n_single; i++) {
        const float * logits = llama_get_logits_ith(ctx, -1);
        out.insert(out.end(), logits, logits + n_vocab);
        llama_token next = (llama_token) ((11 + 17*i) % n_vocab);
        ok = i == n_single || llama_decode(ctx, llama_batch_get_one(&next, 1)) == 0;
    }
    llama_free(ctx);
    return ok ? out : std::vector<float>();
}

static std::vector<float> logits_of(const char * path, const loader & load, const llama_model_params & params) {
    llama_model * model = load(path, params);
    if (model == nullptr) {
        return {};
    }
    std::vector<float> out = compute_logits(model);
    llama_model_free(model);
    return out;
}

static void check_equal(const char * coded, const char * plain, const std::string & what, const loader & load, const llama_model_params & params) {
    const std::vector<float> a = logits_of(coded, load, params);
    const std::vector<float> b = logits_of(plain, load, params);
    check(!a.empty() && a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0, what);
}

static void set_env(const char * name, const char * value) {
#ifdef _WIN32
    _putenv_s(name, value);
#else
    setenv(name, value, 1);
#endif
}

static void set_mode(const char * value) {
    set_env("GGML_ENTROPY_MODE", value);
}

static llama_model_kv_override make_override(const char * key, const char * value) {
    llama_model_kv_override o = {};
    o.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    snprintf(o.key, sizeof(o.key), "%s", key);
    snprintf(o.val_str, sizeof(o.val_str), "%s", value);
    return o;
}

static void check_override(const char * coded, const char * what, const llama_model_kv_override & o, bool expect) {
    const llama_model_kv_override list[2] = { o, {} };
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.kv_overrides = list;
    llama_model * model = llama_model_load_from_file(coded, params);
    check((model != nullptr) == expect, what);
    llama_model_free(model);
}

// Fused mode: close to the stock types without repacking, and bit-identical in every way to load. auto comes to it if memory is short.
static void check_fused(const char * coded, const char * plain, double max_nmse, const loader & load) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers    = 0;
    params.use_extra_bufts = false;
    set_mode("load");
    const std::vector<float> stock = logits_of(plain, load, params);
    set_mode("fused");
    params.load_mode = LLAMA_LOAD_MODE_MMAP;
    const std::vector<float> fused = logits_of(coded, load, params);

    double error = 0.0;
    double power = 0.0;
    for (size_t i = 0; i < stock.size() && i < fused.size(); i++) {
        error += ((double) fused[i] - stock[i])*((double) fused[i] - stock[i]);
        power += (double) stock[i]*stock[i];
    }
    printf("NMSE of fused logits: %.3g\n", error/power);
    check(!fused.empty() && fused.size() == stock.size() && error <= max_nmse*power, "fused logits are close to those of stock types");

    const auto check_same = [&](const std::string & what) {
        const std::vector<float> other = logits_of(coded, load, params);
        check(fused.size() == other.size() && memcmp(fused.data(), other.data(), fused.size()*sizeof(float)) == 0, "fused, " + what);
    };
    params.use_extra_bufts = true;
    check_same("with repacking allowed");
    for (const llama_load_mode mode : { LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MLOCK, LLAMA_LOAD_MODE_MMAP_MLOCK, LLAMA_LOAD_MODE_DIRECT_IO }) {
        params.load_mode = mode;
        check_same(llama_load_mode_name(mode));
    }
    for (const llama_load_mode mode : { LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP }) {
        params.load_mode     = mode;
        params.check_tensors = true;
        check_same(std::string("check_tensors, ") + llama_load_mode_name(mode));
        params.check_tensors = false;
    }

    set_mode("auto");
    set_env("GGML_ENTROPY_MEMORY_MIB", "0.01");
    check_same("chosen by auto where the decoded model does not fit");
    set_env("GGML_ENTROPY_MEMORY_MIB", "x");
    check(logits_of(coded, load, params).empty(), "memory must be a number");
    set_env("GGML_ENTROPY_MEMORY_MIB", "");
    set_mode("load");
}

int main(int argc, char ** argv) {
    const bool fused_only = argc > 1 && strcmp(argv[1], "--fused") == 0;
    if (fused_only) {
        argv++;
        argc--;
    }
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: test-entropy-equal [--fused] CODED.gguf PLAIN.gguf [MAX_NMSE]\n");
        return 1;
    }
    const char * coded = argv[1];
    const char * plain = argv[2];
    const bool   is_split = strstr(coded, "-of-") != nullptr; // a FILE * cannot name the other parts

    if (getenv("TEST_ENTROPY_VERBOSE") == nullptr) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }
    set_mode("load");
    llama_backend_init();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;

    const loader from_path = [](const char * path, llama_model_params p) {
        return llama_model_load_from_file(path, p);
    };
    check_fused(coded, plain, argc == 4 ? atof(argv[3]) : 1e-4, from_path);
    if (fused_only) {
        llama_backend_free();
        printf("%d passed, %d failed\n", n_passed, n_failed);
        return n_failed == 0 ? 0 : 1;
    }

    const loader from_file = [](const char * path, llama_model_params p) -> llama_model * {
        FILE * f = fopen(path, "rb");
        if (f == nullptr) {
            return nullptr;
        }
        llama_model * model = llama_model_load_from_file_ptr(f, p);
        fclose(f);
        return model;
    };

    for (const llama_load_mode mode : { LLAMA_LOAD_MODE_AUTO, LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP, LLAMA_LOAD_MODE_MLOCK,
            LLAMA_LOAD_MODE_MMAP_MLOCK, LLAMA_LOAD_MODE_DIRECT_IO }) {
        for (const bool repack : { true, false }) {
            params.load_mode       = mode;
            params.use_extra_bufts = repack;
            check_equal(coded, plain, std::string("logits, ") + llama_load_mode_name(mode) + (repack ? ", repacked" : ""), from_path, params);
        }
    }
    for (const llama_load_mode mode : { LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP }) {
        params.load_mode = mode;
        if (!is_split) {
            check_equal(coded, plain, std::string("logits, FILE *, ") + llama_load_mode_name(mode), from_file, params);
        }
        params.check_tensors = true;
        check_equal(coded, plain, std::string("logits, check_tensors, ") + llama_load_mode_name(mode), from_path, params);
        params.check_tensors = false;
    }


    // the switch
    set_mode("");
    check_override(coded, "entropy.mode = auto",      make_override("entropy.mode", "auto"),  true);
    check_override(coded, "entropy.mode = load",      make_override("entropy.mode", "load"),  true);
    check_override(coded, "entropy.mode = fused",     make_override("entropy.mode", "fused"), true);
    check_override(coded, "entropy.mode = nonsense",  make_override("entropy.mode", "x"),     false);
    check_override(plain, "a file without such tensors does not care", make_override("entropy.mode", "x"), true);
    llama_model_kv_override number = {};
    number.tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
    number.val_i64 = 1;
    snprintf(number.key, sizeof(number.key), "entropy.mode");
    check_override(coded, "entropy.mode as a number", number, false);
    set_mode("x");
    check_override(coded, "environment nonsense", make_override("some.key", "load"), false);
    check_override(coded, "override wins over environment", make_override("entropy.mode", "load"), true);
    set_mode("load");
    check_override(coded, "environment load", make_override("some.key", "x"), true);
    set_mode("");

    // progress and cancelling
    for (const llama_load_mode mode : { LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP }) {
        std::vector<float> steps;
        params.load_mode = mode;
        params.progress_callback_user_data = &steps;
        params.progress_callback = [](float progress, void * ud) {
            ((std::vector<float> *) ud)->push_back(progress);
            return true;
        };
        llama_model * model = llama_model_load_from_file(coded, params);
        bool ok = model != nullptr && steps.size() > 2 && steps.back() == 1.0f;
        for (size_t i = 1; i < steps.size(); i++) {
            ok = ok && steps[i] >= steps[i - 1];
        }
        check(ok, std::string("progress, ") + llama_load_mode_name(mode));
        llama_model_free(model);

        params.progress_callback = [](float progress, void *) {
            return progress < 0.5f;
        };
        model = llama_model_load_from_file(coded, params);
        check(model == nullptr, std::string("cancel, ") + llama_load_mode_name(mode));
        llama_model_free(model);
    }
    params.progress_callback           = nullptr;
    params.progress_callback_user_data = nullptr;

    // what the memory-fit pass does: no data, nothing mapped
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    params.no_alloc  = true;
    llama_model * model = llama_model_load_from_file(coded, params);
    check(model != nullptr, "no_alloc");
    llama_model_free(model);

    llama_backend_free();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed == 0 ? 0 : 1;
}
