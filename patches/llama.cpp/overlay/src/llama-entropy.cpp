// SPDX-License-Identifier: MIT
//
// Entropy-coded tensors in the model loader; see llama-entropy.h for the whole picture.
//
// Order of this file: refusals, the switch and the rule, decoding, loading.
//
// Decoding is cut into chunks of whole row groups of one slab, about CHUNK_WEIGHTS weights each, which threads take from a counter: row
// groups are independent, and a slab of a small expert may have fewer of them than there are threads. It writes into the tensor where
// its buffer is host memory; otherwise into a temporary and then once into the tensor, because buffers that repack (CPU_REPACK)
// or slice (tensor parallelism) want a whole tensor in one call.
//
// Limits: a mapped file that another process rewrites is read twice (validated, then decoded). In fused mode it is read for as long as
// the model lives, and kernels trust the index that was validated: rewriting the file under a running model can crash it.

#include "llama-entropy.h"

#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"

#include "ggml-backend.h"
#include "../ggml/src/ggml-backend-entropy.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
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

static constexpr const char * ENV_MODE   = "GGML_ENTROPY_MODE";
static constexpr const char * ENV_MEMORY = "GGML_ENTROPY_MEMORY_MIB";
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

bool llama_entropy_to_float(ggml_type type, const void * data, size_t n_bytes, float * out) {
    if (!ggml_entropy_is_type(type)) {
        return false;
    }
    const auto decoder = std::make_unique<ggml_entropy_decoder>();
    ggml_entropy_view view;
    for (size_t at = 0; at < n_bytes; at += view.header->slab_size) {
        if (ggml_entropy_open((const uint8_t *) data + at, n_bytes - at, &view) != GGML_ENTROPY_OK) {
            return false;
        }
        ggml_entropy_decoder_open(decoder.get(), &view);
        const int64_t n_cols = view.header->n_cols;
        for (int64_t group = 0; group < view.n_groups; group++) {
            const int n_lanes = (int) std::min<int64_t>(GGML_ENTROPY_LANES, view.header->n_rows - group*GGML_ENTROPY_LANES);
            for (int64_t slice = 0; slice < view.n_slices; slice++) {
                ggml_entropy_decoder_lanes(decoder.get(), group, slice, 0, n_lanes);
                ggml_entropy_decoder_rows(decoder.get(), group, slice, 0, n_lanes, GGML_TYPE_F32, out, n_cols*sizeof(float));
            }
            out += n_lanes*n_cols;
        }
    }
    return true;
}

[[noreturn]] static void throw_damaged(const ggml_tensor * tensor, ggml_entropy_status status) {
    throw std::runtime_error(format("tensor '%s' of type %s: %s: run `entrollm verify FILE`; convert or download the file again",
        ggml_get_name(tensor), ggml_type_name(tensor->type), ggml_entropy_status_str(status)));
}

// ---- the switch and the rule -------------------------------------------------------------------------------------------------------

void llama_entropy::read_mode(const llama_model_loader & ml) {
    std::string value = "auto";
    mode_origin = "default";
    const char * env = std::getenv(ENV_MODE);
    if (env != nullptr && env[0] != '\0') {
        value       = env;
        mode_origin = ENV_MODE;
    }
    // only the user's override counts: a file does not get to choose
    const auto it = ml.kv_overrides.find(KEY_MODE);
    if (it != ml.kv_overrides.end()) {
        if (it->second.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("override %s must be a string, for example --override-kv %s=str:load", KEY_MODE, KEY_MODE));
        }
        value       = it->second.val_str;
        mode_origin = format("override %s", KEY_MODE);
    }

    if (value == "auto") {
        mode = MODE_AUTO;
    } else if (value == "load") {
        mode = MODE_LOAD;
    } else if (value == "fused") {
        mode = MODE_FUSED;
    } else {
        throw std::runtime_error(format("unknown value '%s' of %s: use auto, load or fused", value.c_str(), mode_origin.c_str()));
    }
}

// The smallest of the limits that path/file holds for a cgroup and those above it; limit if there is none.
static size_t cgroup_limit(const std::string & root, std::string path, const char * file, size_t limit) {
    for (;;) {
        std::ifstream in(root + path + "/" + file);
        unsigned long long value; // "max" does not parse
        if (in >> value) {
            limit = std::min<size_t>(limit, value);
        }
        if (path.empty() || path == "/") {
            return limit;
        }
        path.resize(path.rfind('/'));
    }
}

// Bytes of memory that this machine, or the container around us, will ever give: not what is free now, which the memory-fit pass would see
// differently.
static size_t memory_limit() {
    const char * env = std::getenv(ENV_MEMORY);
    if (env != nullptr && env[0] != '\0') {
        char * end;
        const double n_mib = std::strtod(env, &end);
        if (*end != '\0' || !(n_mib > 0) || n_mib > 1e12) {
            throw std::runtime_error(format("unknown value '%s' of %s: give a number of MiB", env, ENV_MEMORY));
        }
        return (size_t) (n_mib*1024*1024);
    }
    size_t free  = 0;
    size_t limit = 0;
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu != nullptr) {
        ggml_backend_dev_memory(cpu, &free, &limit);
    }
    if (limit == 0) {
        limit = SIZE_MAX;
    }
#if defined(__linux__)
    // lines "id:controllers:path"; version 2 has no controllers
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line); ) {
        const size_t first  = line.find(':');
        const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const std::string path        = line.substr(second + 1);
        if (controllers.empty()) {
            limit = cgroup_limit("/sys/fs/cgroup", path, "memory.max", limit);
        } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
            limit = cgroup_limit("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", limit);
        }
    }
#endif
    return limit;
}

// Once, before the first tensor: the switch, the plain type of every entropy-coded tensor of the file, and whether all would fit.
void llama_entropy::survey(const llama_model_loader & ml) {
    read_mode(ml);
    size_t n_plain = 0; // bytes of the decoded model
    for (const auto & [name, weight] : ml.weights_map) {
        const ggml_tensor * tensor = weight.tensor;
        if (!ggml_entropy_is_type(tensor->type)) {
            n_plain += ggml_nbytes(tensor);
            continue;
        }
        ggml_entropy_header raw;
        ggml_entropy_header header;
        llama_file & file = *ml.files.at(weight.idx);
        file.seek(weight.offs, SEEK_SET);
        file.read_raw(&raw, sizeof(raw));
        ggml_entropy_status status = ggml_entropy_check_header(tensor->type, tensor->ne, &raw, &header);
        if (status == GGML_ENTROPY_OK && header.slab_size != tensor->nb[2]) {
            status = GGML_ENTROPY_BAD_LAYOUT; // the file is not the one that gguf.cpp has read
        }
        if (status != GGML_ENTROPY_OK) {
            throw_damaged(tensor, status);
        }
        const ggml_type plain = ggml_entropy_plain_type(&header);
        plain_types[name] = plain;
        n_plain += ggml_row_size(plain, tensor->ne[0])*tensor->ne[1]*tensor->ne[2];
    }
    // a fifth is left for the KV cache, compute buffers and the system
    const size_t limit = memory_limit();
    fits        = n_plain <= limit/5*4;
    auto_reason = format("decoded, the model of %.0f MiB %s in 80 %% of %.0f MiB of memory",
        n_plain/1024.0/1024.0, fits ? "fits" : "does not fit", limit/1024.0/1024.0);
    surveyed = true;
}

bool llama_entropy::set_plain_type(const llama_model_loader & ml, bool reshape, ggml_tensor * tensor) {
    if (!ggml_entropy_is_type(tensor->type)) {
        return false;
    }
    if (reshape) {
        llama_entropy_check_plain(tensor, "but this model needs it in another shape");
    }
    if (!surveyed) {
        survey(ml);
    }
    tensor->type  = plain_types.at(ggml_get_name(tensor));
    tensor->nb[0] = ggml_type_size(tensor->type);
    tensor->nb[1] = ggml_row_size(tensor->type, tensor->ne[0]); // ne[0] is a multiple of 32, as are all block sizes here
    tensor->nb[2] = tensor->nb[1]*tensor->ne[1];
    tensor->nb[3] = tensor->nb[2]*tensor->ne[2];
    return true;
}

// The device that computes on tensors in such buffers: the CPU on its own ones and on the host buffers of others.
static ggml_backend_dev_t device_of(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
    if (device == nullptr || buft == ggml_backend_dev_host_buffer_type(device)) {
        return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    return device;
}

// The rule. It may look at the type, the buffer type and the settings, and at nothing else, above all not at the load mode or at free
// memory: the memory-fit pass, which allocates nothing and maps nothing, must come to the same answer.
bool llama_entropy::stays_coded(
        const ggml_tensor * coded, ggml_backend_buffer_type_t * buft,
        const std::function<ggml_backend_buffer_type_t(ggml_tensor *)> & choose_buft) {
    ggml_backend_dev_t device = device_of(*buft);
    const bool is_cpu = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;

    if (mode == MODE_LOAD || (mode == MODE_AUTO && is_cpu && fits)) {
        return false;
    }
    if (!ggml_backend_entropy_dev_declares(device)) {
        if (mode == MODE_FUSED) {
            throw std::runtime_error(format(
                "mode fused (%s): device %s does not compute on entropy-coded tensors, and tensor '%s' belongs there: use auto or load",
                mode_origin.c_str(), ggml_backend_dev_name(device), ggml_get_name(coded)));
        }
        return false;
    }
    // the payload may need another buffer type, for example because the plain type would be repacked; but it does not change the device
    ggml_tensor meta = *coded;
    ggml_backend_buffer_type_t coded_buft = nullptr;
    try {
        coded_buft = choose_buft(&meta);
    } catch (const std::runtime_error &) {
        return false; // no device computes this op on it
    }
    if (coded_buft == nullptr || device_of(coded_buft) != device || (is_cpu && !ggml_backend_buft_is_host(coded_buft))) {
        return false;
    }
    *buft = coded_buft;
    if (std::find(fused.devices.begin(), fused.devices.end(), device) == fused.devices.end()) {
        fused.devices.push_back(device);
    }
    return true;
}

// ---- decoding ----------------------------------------------------------------------------------------------------------------------

// Decode the validated payload of src into rows of type plain, or verify it (dst is nullptr), with several threads. Returns their number.
static int decode_slabs(const ggml_tensor * src, const uint8_t * data, ggml_type plain, uint8_t * dst, bool verify, ggml_entropy_status * result) {
    const int64_t n_cols  = src->ne[0];
    const int64_t n_rows  = src->ne[1];
    const int64_t n_slabs = src->ne[2];
    const size_t  slab    = src->nb[2];

    const size_t  row_size = dst == nullptr ? 0 : ggml_row_size(plain, n_cols);
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
            if (verify && group0 == 0 && status == GGML_ENTROPY_OK) {
                status = ggml_entropy_verify_hash(&view);
                if (status == GGML_ENTROPY_OK) {
                    status = ggml_entropy_verify_padding(&view);
                }
            }
            if (verify && status == GGML_ENTROPY_OK) {
                status = ggml_entropy_verify_groups(&view, group0, group1);
            }
            if (dst != nullptr && status == GGML_ENTROPY_OK) {
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

// ---- loading -----------------------------------------------------------------------------------------------------------------------

// Headers, tables and index of all slabs; with check also hash, padding and every code.
static ggml_entropy_status validate(const ggml_tensor * src, const uint8_t * coded, bool check) {
    ggml_entropy_status status = ggml_entropy_validate(src->type, src->ne, coded, ggml_nbytes(src));
    if (status == GGML_ENTROPY_OK) {
        ggml_entropy_header header;
        status = ggml_entropy_check_header(src->type, src->ne, coded, &header);
        if (status == GGML_ENTROPY_OK && header.slab_size != src->nb[2]) {
            status = GGML_ENTROPY_BAD_MODE; // the file changed since survey
        }
    }
    if (status == GGML_ENTROPY_OK && check) {
        decode_slabs(src, coded, GGML_TYPE_COUNT, nullptr, true, &status);
    }
    return status;
}

bool llama_entropy::load(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check) {
    if (!ggml_entropy_is_type(src->type)) {
        return false;
    }
    if (ggml_entropy_is_type(dst->type)) {
        return load_coded(src, dst, mapped, file, offs, check);
    }
    load_decoded(src, dst, mapped, file, offs, check);
    return true;
}

bool llama_entropy::load_coded(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check) {
    const size_t n_coded = ggml_nbytes(src);
    std::vector<no_init<uint8_t>> staged;
    const uint8_t * coded = mapped;
    if (coded == nullptr) {
        uint8_t * to = (uint8_t *) dst->data;
        if (!ggml_backend_buffer_is_host(dst->buffer)) {
            staged.resize(n_coded);
            to = (uint8_t *) staged.data();
        }
        file.seek(offs, SEEK_SET);
        file.read_raw(to, n_coded);
        coded = to;
    }
    const ggml_entropy_status status = validate(src, coded, check);
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }
    if (!staged.empty()) {
        ggml_backend_tensor_set(dst, coded, 0, n_coded);
    }
    fused.n_tensors++;
    fused.n_coded += n_coded;
    return mapped == nullptr;
}

void llama_entropy::load_decoded(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check) {
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

    ggml_entropy_status status = validate(src, coded, check);
    if (status == GGML_ENTROPY_OK && ggml_entropy_plain_type((const ggml_entropy_header *) coded) != dst->type) {
        status = GGML_ENTROPY_BAD_MODE; // the file changed since survey
    }
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }

    int n_threads = 0;
    const bool in_place = ggml_backend_buffer_is_host(dst->buffer);
    // a device that can decodes by itself, so that the small payload crosses the bus; --check-tensors wants to see the weights
    if (in_place || check || !ggml_backend_entropy_dev_decode(src, coded, dst)) {
        std::vector<no_init<uint8_t>> plain_buf(in_place ? 0 : n_plain);
        uint8_t * plain = in_place ? (uint8_t *) dst->data : (uint8_t *) plain_buf.data();

        n_threads = decode_slabs(src, coded, dst->type, plain, false, &status);
        if (status == GGML_ENTROPY_OK && check && !ggml_validate_row_data(dst->type, plain, n_plain)) {
            status = GGML_ENTROPY_BAD_SCALE; // a weight of F16 may overflow
        }
        if (status != GGML_ENTROPY_OK) {
            throw_damaged(src, status);
        }
        if (!in_place) {
            ggml_backend_tensor_set(dst, plain, 0, n_plain);
        }
    } else {
        decoded.n_on_device++;
    }
    if (mapped != nullptr) {
        drop_pages(mapped, n_coded);
    }

    decoded.n_tensors++;
    decoded.n_threads = std::max(decoded.n_threads, n_threads);
    decoded.n_coded  += n_coded;
    decoded.n_plain  += n_plain;
    decoded.seconds  += (ggml_time_us() - t_start)/1e6;
}

std::string llama_entropy::reason() const {
    switch (mode) {
        case MODE_LOAD:  return "load: " + mode_origin;
        case MODE_FUSED: return "fused: " + mode_origin;
        default:         return "auto: " + auto_reason;
    }
}

void llama_entropy::log_summary() const {
    if (decoded.n_tensors > 0) {
        const std::string on_device = decoded.n_on_device > 0 ? format(", %d of them on the device", decoded.n_on_device) : "";
        LLAMA_LOG_INFO("%s: decoded %d entropy-coded tensors, %.2f MiB -> %.2f MiB, in %.2f s with %d threads%s (mode %s)\n", "llama_entropy",
            decoded.n_tensors, decoded.n_coded/1024.0/1024.0, decoded.n_plain/1024.0/1024.0, decoded.seconds, decoded.n_threads,
            on_device.c_str(), reason().c_str());
    }
    if (fused.n_tensors > 0) {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        const auto kernel = (const char * (*)()) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_entropy_kernel");
        std::string by;
        for (ggml_backend_dev_t device : fused.devices) {
            by += (by.empty() ? "" : " and ") + std::string(ggml_backend_dev_name(device));
            if (device == cpu && kernel != nullptr) {
                by += std::string(", CPU kernel ") + kernel();
            }
        }
        LLAMA_LOG_INFO("%s: %d entropy-coded tensors, %.2f MiB, stay as they are; computed by %s (mode %s)\n", "llama_entropy",
            fused.n_tensors, fused.n_coded/1024.0/1024.0, by.c_str(), reason().c_str());
    }
}
