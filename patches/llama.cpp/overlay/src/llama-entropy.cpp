// SPDX-License-Identifier: MIT
//
// Load mode of entropy-coded tensors; see llama-entropy.h for the whole picture.
//
// Work is cut into chunks of whole row groups of one slab, about CHUNK_WEIGHTS weights each, which threads take from a counter: row
// groups are independent, and a slab of a small expert may have fewer of them than there are threads. Decoding writes into the tensor where
// its buffer is host memory; otherwise into a temporary and then once into the tensor, because buffers that repack (CPU_REPACK)
// or slice (tensor parallelism) want a whole tensor in one call.
//
// Limits: a mapped file that another process rewrites during the load is read twice (validated, then decoded), as any mapped model is.

#include "llama-entropy.h"

#include "llama-impl.h"
#include "llama-mmap.h"

#include "ggml-backend.h"
#include "../ggml/src/ggml-entropy.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// Decoding takes about a nanosecond per weight, so a chunk is some 0.1 ms: far more than taking it costs, and starting a thread for
// every THREAD_WEIGHTS is worth its 20 microseconds.
static constexpr int64_t CHUNK_WEIGHTS  = 128*1024;
static constexpr int64_t THREAD_WEIGHTS = 256*1024;

static constexpr const char * ENV_MODE = "GGML_ENTROPY_MODE";
static constexpr const char * KEY_MODE = "entropy.mode";

bool llama_entropy_is_decoded(const ggml_tensor * src, const ggml_tensor * dst) {
    return src != nullptr && ggml_entropy_is_type(src->type) && !ggml_entropy_is_type(dst->type);
}

void llama_entropy_check_plain(const ggml_tensor * tensor, const char * why) {
    if (ggml_entropy_is_type(tensor->type)) {
        throw std::runtime_error(format("tensor '%s' is entropy-coded (%s), %s: decode the file first with `entrollm decode`",
            ggml_get_name(tensor), ggml_type_name(tensor->type), why));
    }
}

void llama_entropy_check_quantize(const ggml_tensor * tensor, ggml_type target) {
    llama_entropy_check_plain(tensor, "which llama-quantize cannot read");
    if (ggml_entropy_is_type(target)) {
        throw std::runtime_error(format("tensor '%s': llama-quantize cannot write type %s: convert with `entrollm convert`",
            ggml_get_name(tensor), ggml_type_name(target)));
    }
}

[[noreturn]] static void throw_damaged(const ggml_tensor * tensor, ggml_entropy_status status) {
    throw std::runtime_error(format("tensor '%s' of type %s: %s: run `entrollm verify FILE`; convert or download the file again",
        ggml_get_name(tensor), ggml_type_name(tensor->type), ggml_entropy_status_str(status)));
}

// ---- the switch and the rule -------------------------------------------------------------------------------------------------------

void llama_entropy::read_mode(const kv_overrides & overrides) {
    std::string value  = "auto";
    std::string origin = "default";
    const char * env = std::getenv(ENV_MODE);
    if (env != nullptr && env[0] != '\0') {
        value  = env;
        origin = ENV_MODE;
    }
    // only the user's override counts: a file does not get to choose
    const auto it = overrides.find(KEY_MODE);
    if (it != overrides.end()) {
        if (it->second.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("override %s must be a string, for example --override-kv %s=str:load", KEY_MODE, KEY_MODE));
        }
        value  = it->second.val_str;
        origin = format("override %s", KEY_MODE);
    }

    if (value == "auto") {
        mode        = MODE_AUTO;
        mode_reason = "auto: no device of this build computes on entropy-coded tensors";
    } else if (value == "load") {
        mode        = MODE_LOAD;
        mode_reason = "load: " + origin;
    } else if (value == "fused") {
        mode        = MODE_FUSED;
        mode_reason = "fused: " + origin;
    } else {
        throw std::runtime_error(format("unknown value '%s' of %s: use auto, load or fused", value.c_str(), origin.c_str()));
    }
}

// The rule. It may look at the type, the buffer type (nullptr: not chosen yet) and the settings, and at nothing else, above all not at
// load_mode or free memory: the memory-fit pass, which allocates nothing and maps nothing, must come to the same answer.
// Fused mode will extend it: then a tensor keeps its type if the device of the buffer type that it would get says, through
// ggml_backend_dev_supports_op, that it computes on it.
bool llama_entropy::decode_at_load(const ggml_tensor * tensor, ggml_backend_buffer_type_t buft) const {
    GGML_UNUSED(tensor);
    GGML_UNUSED(buft);
    if (mode == MODE_FUSED) {
        throw std::runtime_error(format("mode %s: no device of this build computes on entropy-coded tensors: use auto or load", mode_reason.c_str()));
    }
    return true;
}

bool llama_entropy::set_plain_type(const kv_overrides & overrides, llama_file & file, size_t offs, bool reshape, ggml_tensor * tensor) {
    if (!ggml_entropy_is_type(tensor->type)) {
        return false;
    }
    if (reshape) {
        llama_entropy_check_plain(tensor, "but this model needs it in another shape");
    }
    if (mode == MODE_UNREAD) {
        read_mode(overrides);
    }
    if (!decode_at_load(tensor, nullptr)) {
        return false;
    }

    ggml_entropy_header raw;
    ggml_entropy_header header;
    file.seek(offs, SEEK_SET);
    file.read_raw(&raw, sizeof(raw));
    ggml_entropy_status status = ggml_entropy_check_header(tensor->type, tensor->ne, &raw, &header);
    if (status == GGML_ENTROPY_OK && header.slab_size != tensor->nb[2]) {
        status = GGML_ENTROPY_BAD_LAYOUT; // the file is not the one that gguf.cpp has read
    }
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(tensor, status);
    }

    tensor->type  = ggml_entropy_plain_type(&header);
    tensor->nb[0] = ggml_type_size(tensor->type);
    tensor->nb[1] = ggml_row_size(tensor->type, tensor->ne[0]); // ne[0] is a multiple of 32, as are all block sizes here
    tensor->nb[2] = tensor->nb[1]*tensor->ne[1];
    tensor->nb[3] = tensor->nb[2]*tensor->ne[2];
    return true;
}

// ---- decoding ----------------------------------------------------------------------------------------------------------------------

// Decode the validated payload of src into rows of type plain, with up to n_threads threads. Returns the threads used.
static int decode_slabs(const ggml_tensor * src, const uint8_t * data, ggml_type plain, uint8_t * dst, bool check, ggml_entropy_status * result) {
    const int64_t n_cols  = src->ne[0];
    const int64_t n_rows  = src->ne[1];
    const int64_t n_slabs = src->ne[2];
    const size_t  slab    = src->nb[2];

    const size_t  row_size = ggml_row_size(plain, n_cols);
    const int64_t n_groups = (n_rows + GGML_ENTROPY_LANES - 1)/GGML_ENTROPY_LANES;
    const int64_t step     = std::max<int64_t>(1, CHUNK_WEIGHTS/(GGML_ENTROPY_LANES*n_cols)); // row groups of a chunk
    const int64_t n_steps  = (n_groups + step - 1)/step;                                      // chunks of a slab
    const int64_t n_chunks = n_steps*n_slabs;

    std::atomic<int64_t> next{0};
    std::atomic<int>     first_bad{GGML_ENTROPY_OK};

    const auto work = [&]() {
        for (int64_t chunk = next++; chunk < n_chunks && first_bad == GGML_ENTROPY_OK; chunk = next++) {
            const int64_t i_slab = chunk/n_steps;
            const int64_t group0 = chunk%n_steps*step;
            const int64_t group1 = std::min(group0 + step, n_groups);

            ggml_entropy_view view;
            ggml_entropy_status status = ggml_entropy_open(data + i_slab*slab, slab, &view);
            if (check && group0 == 0 && status == GGML_ENTROPY_OK) {
                status = ggml_entropy_verify_hash(&view);
                if (status == GGML_ENTROPY_OK) {
                    status = ggml_entropy_verify_padding(&view);
                }
            }
            if (check && status == GGML_ENTROPY_OK) {
                status = ggml_entropy_verify_groups(&view, group0, group1);
            }
            if (status == GGML_ENTROPY_OK) {
                status = ggml_entropy_decode_groups_plain(&view, group0, group1, dst + (i_slab*n_rows + group0*GGML_ENTROPY_LANES)*row_size);
            }
            if (status != GGML_ENTROPY_OK) {
                first_bad = status;
            }
        }
    };

    const int64_t n_useful = std::min(n_chunks, n_cols*n_rows*n_slabs/THREAD_WEIGHTS + 1);
    const int64_t n_wanted = std::min<int64_t>(n_useful, std::max(1u, std::thread::hardware_concurrency()));

    std::vector<std::thread> workers;
    workers.reserve(n_wanted);
    for (int64_t i = 1; i < n_wanted; i++) {
        try {
            workers.emplace_back(work);
        } catch (const std::system_error &) {
            break; // no more threads to be had: go on with fewer
        }
    }
    work();
    for (auto & worker : workers) {
        worker.join();
    }
    *result = (ggml_entropy_status) first_bad.load();
    return (int) workers.size() + 1;
}

// A decoded payload is needed no more, or only once more (tied embeddings), but its mapping stays until the model is freed. Take its
// pages out of the process: they remain in the page cache and come back if they are touched. Fails harmlessly where they are locked.
static void drop_pages(const uint8_t * data, size_t n_bytes) {
#if defined(__linux__)
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) data + page - 1)/page*page;
    const uintptr_t end   = ((uintptr_t) data + n_bytes)/page*page;
    if (begin < end) {
        (void) madvise((void *) begin, end - begin, MADV_DONTNEED);
    }
#else
    GGML_UNUSED(data);
    GGML_UNUSED(n_bytes);
#endif
}

void llama_entropy::load(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check) {
    const int64_t t_start = ggml_time_us();
    const size_t  n_coded = ggml_nbytes(src);
    const size_t  n_plain = ggml_nbytes(dst);

    std::vector<no_init<uint8_t>> coded_buf;
    const uint8_t * coded = mapped;
    if (coded == nullptr) {
        coded_buf.resize(n_coded);
        file.seek(offs, SEEK_SET);
        file.read_raw(coded_buf.data(), n_coded);
        coded = (const uint8_t *) coded_buf.data();
    } else if ((uintptr_t) coded % 8 != 0) {
        // general.alignment below 8, or a GGUF inside another file; the codec wants 8
        coded_buf.resize(n_coded);
        memcpy((void *) coded_buf.data(), coded, n_coded);
        coded = (const uint8_t *) coded_buf.data();
    }

    ggml_entropy_status status = ggml_entropy_validate(src->type, src->ne, coded, n_coded);
    if (status == GGML_ENTROPY_OK) {
        ggml_entropy_header header;
        status = ggml_entropy_check_header(src->type, src->ne, coded, &header);
        if (status == GGML_ENTROPY_OK && (ggml_entropy_plain_type(&header) != dst->type || header.slab_size != src->nb[2])) {
            status = GGML_ENTROPY_BAD_MODE; // the file changed since set_plain_type
        }
    }
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }

    const bool in_place = ggml_backend_buffer_is_host(dst->buffer);
    std::vector<no_init<uint8_t>> plain_buf(in_place ? 0 : n_plain);
    uint8_t * plain = in_place ? (uint8_t *) dst->data : (uint8_t *) plain_buf.data();

    const int n_threads = decode_slabs(src, coded, dst->type, plain, check, &status);
    if (status == GGML_ENTROPY_OK && check && !ggml_validate_row_data(dst->type, plain, n_plain)) {
        status = GGML_ENTROPY_BAD_SCALE; // a weight of F16 may overflow
    }
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }
    if (!in_place) {
        ggml_backend_tensor_set(dst, plain, 0, n_plain);
    }
    if (mapped != nullptr) {
        drop_pages(mapped, n_coded);
    }

    n_tensors++;
    n_threads_max  = std::max(n_threads_max, n_threads);
    n_bytes_coded += n_coded;
    n_bytes_plain += n_plain;
    seconds       += (ggml_time_us() - t_start)/1e6;
}

void llama_entropy::log_summary() const {
    if (n_tensors > 0) {
        LLAMA_LOG_INFO("%s: decoded %d entropy-coded tensors, %.2f MiB -> %.2f MiB, in %.2f s with %d threads (mode %s)\n", "llama_entropy",
            n_tensors, n_bytes_coded/1024.0/1024.0, n_bytes_plain/1024.0/1024.0, seconds, n_threads_max, mode_reason.c_str());
    }
}
