// SPDX-License-Identifier: MIT
//
// A hostile file must not crash the loader: damage a small GGUF with entropy-coded tensors in many ways and load it each time.
//
//   test-entropy-load FILE [--stride N] [--truncations N] [--rewrites N] [--seed N] [--jobs N/I]
//
// (a) truncates the file, at every byte if it has at most --truncations of them, else at as many seeded lengths; (b) changes one byte of
// the tensor infos and of the payloads of entropy-coded tensors to another value that the seed chooses, and a second time by a single bit:
// every byte of the tensor infos and of the used part of slab headers, and every --stride-th byte behind them (by default so that there are
// some 8000 of those; 1 is all of them). Each damaged file is loaded from disk on the CPU, alternately with and without mmap; where it
// loads, two tokens are decoded. To be refused and to be loaded are both fine, with one exception: a file that ends before its last tensor
// must be refused. (c) changes --rewrites such bytes, most of them of headers, only when the file is mapped and the model runs in fused
// mode: then it may also stop with SIGABRT, which is how an op refuses a slab. Loading runs in child processes, so that a crash or a hang
// is counted and the test goes on; build with ASan and UBSan to make it worth its time. --jobs N/I does the I-th of N equal parts of the
// cases.
//
// Limits: needs fork(); on Windows it does nothing. Give it a file of some hundred kilobytes: every case loads the whole model.

#include "llama.h"
#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#ifdef _WIN32
int main() {
    printf("no fork() here\n0 passed, 0 failed\n");
    return 0;
}
#else

#include <csignal>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

static constexpr unsigned HANG_SECONDS      = 120;
static constexpr size_t   DEFAULT_POSITIONS = 8192;
static constexpr size_t   USED_HEADER       = 120;  // bytes of a slab's header that are not reserved

struct test_case {
    bool    truncate;
    size_t  at;       // length of the file, or position of the byte
    uint8_t mask;     // of the bits to flip
    bool    mmap;
    bool    must_fail;
    bool    late;     // damaged when it is loaded
};

struct test_file {
    std::string          path;
    std::vector<uint8_t> data;

    bool read(const char * name) {
        FILE * f = fopen(name, "rb");
        if (f == nullptr) {
            return false;
        }
        uint8_t buf[65536];
        for (size_t n; (n = fread(buf, 1, sizeof(buf), f)) > 0;) {
            data.insert(data.end(), buf, buf + n);
        }
        fclose(f);
        return !data.empty();
    }

    // The damaged copy. Only what differs is written: the file is the whole one before and after.
    bool damage(const test_case & c) const {
        if (c.truncate) {
            return ::truncate(path.c_str(), (off_t) c.at) == 0;
        }
        return write_at(c.at, data[c.at] ^ c.mask);
    }

    bool repair(const test_case & c) const {
        if (!c.truncate) {
            return write_at(c.at, data[c.at]);
        }
        const int fd = open(path.c_str(), O_WRONLY);
        size_t done = c.at;
        while (fd >= 0 && done < data.size()) {
            const ssize_t n = pwrite(fd, data.data() + done, data.size() - done, (off_t) done);
            if (n <= 0) {
                break;
            }
            done += n;
        }
        return fd >= 0 && close(fd) == 0 && done == data.size();
    }

private:
    bool write_at(size_t at, uint8_t value) const {
        const int fd = open(path.c_str(), O_WRONLY);
        return fd >= 0 && pwrite(fd, &value, 1, (off_t) at) == 1 && close(fd) == 0;
    }
};

// [begin, end) of the file; up to dense every byte counts
struct test_range {
    size_t begin;
    size_t end;
    size_t dense;
};

// Where the tensor infos and, behind them, the n_payloads payloads of entropy-coded tensors stand, and where the last tensor ends.
static bool find_ranges(const std::vector<uint8_t> & data, std::vector<test_range> & ranges, size_t & n_payloads, size_t & data_end) {
    gguf_context * ctx = gguf_init_from_buffer(data.data(), data.size(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr });
    if (ctx == nullptr || gguf_get_n_tensors(ctx) == 0) {
        gguf_free(ctx);
        return false;
    }
    const size_t data_offset = gguf_get_data_offset(ctx);

    // the infos begin with the first tensor's name, a length of 8 bytes before it
    const std::string first = gguf_get_tensor_name(ctx, 0);
    std::string name(8, '\0');
    const uint64_t length = first.size();
    memcpy(&name[0], &length, 8);
    name += first;
    const auto meta_end = data.begin() + data_offset;
    const auto it = std::find_end(data.begin(), meta_end, name.begin(), name.end());
    if (it != meta_end) {
        ranges.push_back({ (size_t) (it - data.begin()), data_offset, data_offset });
    }

    data_end   = 0;
    n_payloads = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(ctx); i++) {
        const size_t begin = data_offset + gguf_get_tensor_offset(ctx, i);
        const size_t end   = begin + gguf_get_tensor_size(ctx, i);
        const ggml_type type = gguf_get_tensor_type(ctx, i);
        data_end = std::max(data_end, end);
        if (type == GGML_TYPE_EQ8 || type == GGML_TYPE_EQ4 || type == GGML_TYPE_EBF16) {
            ranges.push_back({ begin, end, begin + USED_HEADER });
            n_payloads++;
        }
    }
    gguf_free(ctx);
    return n_payloads > 0;
}

// Load, call loaded, decode two tokens if that works. Returns whether it loaded.
static bool load_and_decode(const char * path, bool use_mmap, const std::function<void()> & loaded) {
    llama_model_params mparams = llama_model_default_params();
    mparams.load_mode    = use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    mparams.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(path, mparams);
    if (model == nullptr) {
        return false;
    }
    loaded();
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx     = 32;
    cparams.n_batch   = 32;
    cparams.n_threads = cparams.n_threads_batch = 1;
    llama_context * ctx = llama_init_from_model(model, cparams);
    if (ctx != nullptr) {
        llama_token tokens[2] = { 0, 1 };
        llama_decode(ctx, llama_batch_get_one(tokens, 2));
        llama_free(ctx);
    }
    llama_model_free(model);
    return true;
}

// In a child: run the cases from first on, one letter each to the pipe.
[[noreturn]] static void run_child(const test_file & file, const std::vector<test_case> & cases, size_t first, int fd) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_set_abort_callback([](const char *) {});
    llama_backend_init();
    const char * env = getenv("GGML_ENTROPY_MODE");
    const std::string mode = env ? env : "";
    for (size_t i = first; i < cases.size(); i++) {
        alarm(HANG_SECONDS);
        setenv("GGML_ENTROPY_MODE", cases[i].late ? "fused" : mode.c_str(), 1);
        bool damaged = cases[i].late || file.damage(cases[i]);
        const bool loaded = damaged && load_and_decode(file.path.c_str(), cases[i].mmap, [&]() {
            damaged = !cases[i].late || file.damage(cases[i]);
        });
        if (!damaged || !file.repair(cases[i])) {
            fprintf(stderr, "cannot write %s\n", file.path.c_str());
            _exit(2);
        }
        const char letter = loaded ? 'l' : 'r';
        if (write(fd, &letter, 1) != 1) {
            _exit(2);
        }
    }
    _exit(0);
}

static std::string describe(const test_case & c) {
    char buf[128];
    if (c.truncate) {
        snprintf(buf, sizeof(buf), "truncated to %zu bytes, %s", c.at, c.mmap ? "mmap" : "read");
    } else {
        snprintf(buf, sizeof(buf), "byte %zu ^ 0x%02x, %s%s", c.at, c.mask, c.mmap ? "mmap" : "read", c.late ? ", while it runs" : "");
    }
    return buf;
}

int main(int argc, char ** argv) {
    const char * name = nullptr;
    size_t   stride      = 0;
    size_t   truncations = 4096;
    size_t   rewrites    = 512;
    unsigned seed        = 1;
    size_t   n_jobs      = 1;
    size_t   i_job       = 1;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        if (arg == "--stride" && i + 1 < argc) {
            stride = std::max(1l, atol(argv[++i]));
        } else if (arg == "--truncations" && i + 1 < argc) {
            truncations = std::max(1l, atol(argv[++i]));
        } else if (arg == "--rewrites" && i + 1 < argc) {
            rewrites = std::max(0l, atol(argv[++i]));
        } else if (arg == "--seed" && i + 1 < argc) {
            seed = (unsigned) atol(argv[++i]);
        } else if (arg == "--jobs" && i + 1 < argc && sscanf(argv[++i], "%zu/%zu", &n_jobs, &i_job) == 2 && i_job >= 1 && i_job <= n_jobs) {
            // taken over
        } else if (arg[0] != '-' && name == nullptr) {
            name = argv[i];
        } else {
            fprintf(stderr, "usage: %s FILE [--stride N] [--truncations N] [--rewrites N] [--seed N] [--jobs N/I]\n", argv[0]);
            return 1;
        }
    }

    test_file file;
    std::vector<test_range> ranges;
    size_t n_payloads = 0;
    size_t data_end   = 0;
    if (name == nullptr || !file.read(name) || !find_ranges(file.data, ranges, n_payloads, data_end)) {
        fprintf(stderr, "no GGUF with entropy-coded tensors: %s\n", name ? name : "(no file given)");
        return 1;
    }

    const char * tmp = getenv("TMPDIR");
    std::string path = std::string(tmp ? tmp : "/tmp") + "/test-entropy-load-XXXXXX";
    const int fd = mkstemp(&path[0]);
    if (fd < 0 || close(fd) != 0) {
        perror(path.c_str());
        return 1;
    }
    file.path = path;
    if (!file.repair({ true, 0, 0, false, false, false })) {
        perror(path.c_str());
        return 1;
    }

    std::mt19937 rng(seed);
    std::vector<test_case> cases;
    // the whole file, which must load (mask 0 damages nothing)
    cases.push_back({ false, 0, 0, true,  false, false });
    cases.push_back({ false, 0, 0, false, false, false });
    const size_t n_whole = cases.size();

    const bool all = file.data.size() <= truncations;
    for (size_t i = 0; i < (all ? file.data.size() : truncations); i++) {
        const size_t at = all ? i : rng() % file.data.size();
        cases.push_back({ true, at, 0, (rng() & 1) != 0, at < data_end, false });
    }
    if (stride == 0) {
        size_t n_sparse = 0;
        for (const auto & range : ranges) {
            n_sparse += range.end - range.dense;
        }
        stride = n_sparse/DEFAULT_POSITIONS + 1;
    }
    for (const auto & range : ranges) {
        for (size_t at = range.begin; at < range.end; at += at < range.dense ? 1 : stride) {
            const bool mmap = (rng() & 1) != 0;
            cases.push_back({ false, at, (uint8_t) (1 + rng() % 255),    mmap, false, false });
            cases.push_back({ false, at, (uint8_t) (1u << (rng() % 8)), !mmap, false, false });
        }
    }
    for (size_t i = 0; i < rewrites; i++) {
        const auto & range = ranges[ranges.size() - n_payloads + rng() % n_payloads];
        const size_t end   = i % 4 == 0 ? range.end : range.begin + USED_HEADER;
        cases.push_back({ false, range.begin + rng() % (end - range.begin), (uint8_t) (1 + rng() % 255), true, false, true });
    }
    if (n_jobs > 1) {
        std::vector<test_case> mine;
        for (size_t i = 0; i < cases.size(); i++) {
            if (i < n_whole || i % n_jobs == i_job - 1) {
                mine.push_back(cases[i]);
            }
        }
        cases = std::move(mine);
    }

    size_t n_loaded  = 0;
    size_t n_refused = 0;
    size_t n_stopped = 0;
    size_t n_failed  = 0;
    for (size_t done = 0; done < cases.size();) {
        int fds[2];
        if (pipe(fds) != 0) {
            perror("pipe");
            return 1;
        }
        const pid_t pid = fork();
        if (pid == 0) {
            close(fds[0]);
            run_child(file, cases, done, fds[1]);
        }
        close(fds[1]);
        char letter;
        while (pid > 0 && read(fds[0], &letter, 1) == 1) {
            const test_case & c = cases[done];
            const bool loaded = letter == 'l';
            const bool wrong  = loaded ? c.must_fail : done < n_whole;
            if (wrong) {
                printf("%s: was %s\n", describe(c).c_str(), loaded ? "loaded" : "refused");
            }
            n_failed  += wrong;
            n_loaded  += loaded;
            n_refused += !loaded;
            done++;
        }
        close(fds[0]);
        int status = -1;
        if (pid < 0 || waitpid(pid, &status, 0) != pid || (WIFEXITED(status) && WEXITSTATUS(status) == 2)) {
            fprintf(stderr, "cannot run a child process\n");
            return 1;
        }
        if (done < cases.size()) {
            if (cases[done].late && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) {
                n_stopped++;
            } else {
                printf("%s: crash or hang (status 0x%x)\n", describe(cases[done]).c_str(), status);
                n_failed++;
            }
            if (!file.repair(cases[done])) {
                perror(path.c_str());
                return 1;
            }
            done++;
        } else if (status != 0) {
            printf("crash at exit (status 0x%x)\n", status);
            n_failed++;
        }
        fflush(stdout);
    }
    unlink(path.c_str());

    printf("%zu refused, %zu loaded, %zu stopped\n", n_refused, n_loaded, n_stopped);
    printf("%zu passed, %zu failed\n", cases.size() - std::min(cases.size(), n_failed), n_failed);
    return n_failed == 0 ? 0 : 1;
}
#endif
