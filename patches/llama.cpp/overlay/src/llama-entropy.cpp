// SPDX-License-Identifier: MIT
//
// Entropy-coded tensors in the model loader; see llama-entropy.h for the whole picture.
//
// Order of this file: refusals, the switch and the rule, loading. One file, since all three are members of llama_entropy and share its
// state. The work with the codec, by all threads, is in llama-entropy-codec.cpp.
//
// Decoding writes into the tensor where its buffer is host memory; otherwise into a temporary and then once into the tensor, because
// buffers that repack (CPU_REPACK) or slice (tensor parallelism) want a whole tensor in one call.
//
// A mapped file may be rewritten while it is loaded. Headers are therefore taken by value when they are validated (ggml_entropy_view),
// compared with what the survey saw, and not read again.

#include "llama-entropy.h"
#include "llama-entropy-codec.h"

#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"

#include "ggml-backend.h"
#include "../ggml/src/ggml-backend-entropy.h"
#include "../ggml/src/ggml-entropy-lanes.h"
#include "../ggml/src/ggml-entropy-switch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

static constexpr const char * KEY_MODE = "entropy.mode";

// The device that computes on tensors in such buffers: the CPU on its own ones and on the host buffers of others.
static ggml_backend_dev_t device_of(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
    if (device == nullptr || buft == ggml_backend_dev_host_buffer_type(device)) {
        return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    return device;
}

bool llama_entropy_has_device_layout(ggml_backend_buffer_type_t buft) {
    return ggml_backend_dev_type(device_of(buft)) != GGML_BACKEND_DEVICE_TYPE_CPU;
}

// A tensor without a buffer is to be mapped.
static bool has_device_layout(const ggml_tensor * dst) {
    return ggml_entropy_is_type(dst->type) && dst->buffer != nullptr
        && llama_entropy_has_device_layout(ggml_backend_buffer_get_type(dst->buffer));
}

bool llama_entropy_is_converted(const ggml_tensor * src, const ggml_tensor * dst) {
    return src != nullptr && ggml_entropy_is_type(src->type) && (!ggml_entropy_is_type(dst->type) || has_device_layout(dst));
}

void llama_entropy_check_plain(const ggml_tensor * tensor, const char * why) {
    if (ggml_entropy_is_type(tensor->type)) {
        throw std::runtime_error(format("tensor '%s' is entropy-coded (%s), %s: decode the file first with `entrollm decode`",
            ggml_get_name(tensor), ggml_type_name(tensor->type), why));
    }
}

void llama_entropy_check_use(const std::string & name, llm_tensor kind, ggml_op op) {
    // scales beside a matrix go by its kind and op
    static const std::string WEIGHT = ".weight";
    const bool is_weight = name.size() >= WEIGHT.size() && name.compare(name.size() - WEIGHT.size(), WEIGHT.size(), WEIGHT) == 0;
    bool takes_coded = is_weight && (op == GGML_OP_MUL_MAT || op == GGML_OP_MUL_MAT_ID || op == GGML_OP_GET_ROWS);
    switch (kind) {
        case LLM_TENSOR_TOKEN_TYPES:       // a row of it is added
        case LLM_TENSOR_D2T:               // holds integers
        case LLM_TENSOR_FFN_GATE_TID2EID:
            takes_coded = false;
            break;
        default:
            break;
    }
    if (!takes_coded) {
        throw std::runtime_error(format(
            "tensor '%s' is entropy-coded, but to this model it is no weight of a matrix product and no table of rows: "
            "convert the file again", name.c_str()));
    }
}

void llama_entropy_check_quantize(const ggml_tensor * tensor, ggml_type target) {
    llama_entropy_check_plain(tensor, "which llama-quantize cannot read");
    if (ggml_entropy_is_type(target)) {
        throw std::runtime_error(format("tensor '%s': llama-quantize cannot write type %s: convert with `entrollm convert`",
            ggml_get_name(tensor), ggml_type_name(target)));
    }
    if (ggml_blck_size(target) == 0) { // in the gap below our ids, or removed
        throw std::runtime_error(format("tensor '%s': there is no type of number %d to quantize to", ggml_get_name(tensor), (int) target));
    }
}

// A slab in the device layout as floats.
static void lanes_to_float(const ggml_tensor * tensor, const uint8_t * slab, float * out) {
    std::vector<int8_t> codes(tensor->ne[0]);
    for (int64_t row = 0; row < tensor->ne[1]; row++) {
        float scale;
        float offset;
        ggml_entropy_lanes_row_grid(slab, row, &scale, &offset);
        ggml_entropy_lanes_decode_row(slab, row, codes.data());
        for (const int8_t q : codes) {
            *out++ = scale*q + offset;
        }
    }
}

bool llama_entropy_to_float(const ggml_tensor * tensor, const void * data, float * out) {
    if (!ggml_entropy_is_type(tensor->type)) {
        return false;
    }
    for (int64_t i = 0; i < tensor->ne[2]; i++, out += tensor->ne[0]*tensor->ne[1]) {
        const auto * slab = (const uint8_t *) data + i*tensor->nb[2];
        if (has_device_layout(tensor)) {
            lanes_to_float(tensor, slab, out);
            continue;
        }
        ggml_entropy_view view;
        if (ggml_entropy_open(slab, tensor->nb[2], &view) != GGML_ENTROPY_OK
                || view.header.n_cols != tensor->ne[0] || view.header.n_rows != tensor->ne[1]) {
            GGML_ABORT("tensor '%s' of type %s: the file was changed after the model was loaded: load it again",
                ggml_get_name(tensor), ggml_type_name(tensor->type));
        }
        const ggml_entropy_status status = ggml_entropy_decode_groups_plain(&view, 0, view.n_groups, GGML_TYPE_F32, out);
        if (status != GGML_ENTROPY_OK) {
            GGML_ABORT("tensor '%s' of type %s: %s", ggml_get_name(tensor), ggml_type_name(tensor->type), ggml_entropy_status_str(status));
        }
    }
    return true;
}

[[noreturn]] static void throw_damaged(const ggml_tensor * tensor, ggml_entropy_status status) {
    // the reason of an old file names the remedy itself, and where memory is short the file is not to blame
    const bool is_said = status == GGML_ENTROPY_OLD_VERSION || status == GGML_ENTROPY_NO_MEMORY;
    const char * remedy = is_said ? "" : ": run `entrollm verify FILE`; convert or download the file again";
    throw std::runtime_error(format("tensor '%s' of type %s: %s%s",
        ggml_get_name(tensor), ggml_type_name(tensor->type), ggml_entropy_status_str(status), remedy));
}

[[noreturn]] static void throw_changed(const ggml_tensor * tensor) {
    throw std::runtime_error(format("tensor '%s' of type %s: the file was changed while it was loaded: load it again",
        ggml_get_name(tensor), ggml_type_name(tensor->type)));
}

// ---- the switch and the rule -------------------------------------------------------------------------------------------------------

// What backends refuse of their own switches.
static void check_switches_of_backends() {
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        const auto refusal = (ggml_backend_entropy_refusal_t) ggml_backend_reg_get_proc_address(
            ggml_backend_reg_get(i), "ggml_backend_entropy_refusal");
        const char * line = refusal != nullptr ? refusal() : nullptr;
        if (line != nullptr) {
            throw std::runtime_error(line);
        }
    }
}

void llama_entropy::read_mode(const llama_model_loader & ml) {
    ggml_entropy_switch chosen("GGML_ENTROPY_MODE", "auto");
    mode_origin = chosen.is_default ? "default" : chosen.name;
    // only the user's override counts: a file does not get to choose
    const auto it = ml.kv_overrides.find(KEY_MODE);
    if (it != ml.kv_overrides.end()) {
        if (it->second.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("override %s must be a string, for example --override-kv %s=str:load", KEY_MODE, KEY_MODE));
        }
        chosen.value = it->second.val_str;
        chosen.name  = format("override %s", KEY_MODE);
        mode_origin  = chosen.name;
    }

    if (chosen.value == "auto") {
        mode = MODE_AUTO;
    } else if (chosen.value == "load") {
        mode = MODE_LOAD;
    } else if (chosen.value == "fused") {
        mode = MODE_FUSED;
    } else {
        throw std::runtime_error(chosen.refusal("auto, load or fused"));
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
    const ggml_entropy_switch memory("GGML_ENTROPY_MEMORY_MIB", "");
    if (!memory.is_default) {
        char * end;
        const double n_mib = std::strtod(memory.value.c_str(), &end);
        if (*end != '\0' || !(n_mib > 0) || n_mib > 1e12) {
            throw std::runtime_error(memory.refusal("a number of MiB"));
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

#if defined(__linux__)
static bool cpu_is_numa() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = cpu == nullptr ? nullptr : ggml_backend_dev_backend_reg(cpu);
    const auto is_numa = reg == nullptr ? nullptr : (bool (*)()) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_is_numa");
    return is_numa != nullptr && is_numa();
}
#endif

llama_entropy::~llama_entropy() {
    stop_reader = true;
    if (reader.joinable()) {
        reader.join();
    }
}

void llama_entropy::read_ahead(const llama_model_loader & ml) {
#if defined(__linux__)
    struct range {
        uint16_t file;
        size_t   begin;
        size_t   end;
    };
    std::vector<range> ranges;
    size_t n_bytes = 0;
    for (const auto & [name, weight] : ml.weights_map) {
        if (ggml_entropy_is_type(weight.tensor->type)) {
            const size_t size = ggml_nbytes(weight.tensor);
            ranges.push_back({ weight.idx, weight.offs, weight.offs + size });
            n_bytes += size;
        }
    }
    // not where pages would be gone again before they are used, and each node of a NUMA system is to read its own (llama_mmap)
    if (!ml.use_mmap || n_bytes == 0 || n_bytes > memory_limit()/2 || cpu_is_numa()) {
        return;
    }
    std::sort(ranges.begin(), ranges.end(), [](const range & a, const range & b) {
        return a.file != b.file ? a.file < b.file : a.begin < b.begin;
    });
    // Files are opened anew: what the kernel knows of a reader's habits is the open file's, and the reader may live longer than the
    // loader's. Whatever fails only means that pages are read later.
    std::vector<int> files;
    for (const auto & file : ml.files) {
        files.push_back(open(format("/proc/self/fd/%d", file->file_id()).c_str(), O_RDONLY | O_CLOEXEC));
    }
    const auto close_all = [files] {
        for (const int file : files) {
            if (file >= 0) {
                close(file);
            }
        }
    };
    try {
        reader = std::thread([this, ranges, files, close_all] {
            char piece[1 << 16]; // on the stack: what is freed to the heap may stay resident
            for (const range & one : ranges) {
                for (size_t at = one.begin; at < one.end && !stop_reader; at += sizeof(piece)) {
                    if (pread(files[one.file], piece, std::min(sizeof(piece), one.end - at), (off_t) at) <= 0) {
                        break;
                    }
                }
            }
            close_all();
        });
    } catch (const std::exception &) {
        close_all();
    }
#else
    GGML_UNUSED(ml);
#endif
}

// Once, before the first tensor: the switch, a header of every entropy-coded tensor of the file, and whether all would fit if decoded.
void llama_entropy::survey(const llama_model_loader & ml) {
    check_switches_of_backends();
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
        const ggml_entropy_status status = ggml_entropy_check_header(tensor->type, tensor->ne, &raw, &header);
        if (status != GGML_ENTROPY_OK) {
            throw_damaged(tensor, status);
        }
        if (header.slab_size != tensor->nb[2]) {
            throw_changed(tensor); // it is not the file that gguf.cpp has read
        }
        headers[name] = header;
        n_plain += ggml_row_size(ggml_entropy_plain_type(&header), tensor->ne[0])*tensor->ne[1]*tensor->ne[2];
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
    tensor->type  = ggml_entropy_plain_type(&headers.at(ggml_get_name(tensor)));
    tensor->nb[0] = ggml_type_size(tensor->type);
    tensor->nb[1] = ggml_row_size(tensor->type, tensor->ne[0]); // ne[0] is a multiple of 32, as are all block sizes here
    tensor->nb[2] = tensor->nb[1]*tensor->ne[1];
    tensor->nb[3] = tensor->nb[2]*tensor->ne[2];
    return true;
}

// Weights that a graph of llama.cpp views or reshapes, which needs rows of a known size.
static bool is_viewed(llm_tensor kind) {
    return kind == LLM_TENSOR_PER_LAYER_TOKEN_EMBD // the row of the padding, with images: gemma3n.cpp, gemma4.cpp
        || kind == LLM_TENSOR_TIME_MIX_W2;         // as five matrices: rwkv6-base.cpp
}

// The rule. It may look at what the tensor is, the buffer type and the settings, and at nothing else, above all not at the load mode or at
// free memory: the memory-fit pass, which allocates nothing and maps nothing, must come to the same answer.
bool llama_entropy::stays_coded(
        llm_tensor kind, const ggml_tensor * coded, ggml_backend_buffer_type_t * buft,
        const std::function<ggml_backend_buffer_type_t(ggml_tensor *)> & choose_buft, ggml_tensor * meta) {
    ggml_backend_dev_t device = device_of(*buft);
    const bool is_cpu = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;

    if (mode == MODE_LOAD || (mode == MODE_AUTO && is_cpu && fits) || is_viewed(kind)) {
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
    ggml_tensor there = *coded;
    ggml_backend_buffer_type_t coded_buft = nullptr;
    try {
        coded_buft = choose_buft(&there);
    } catch (const std::runtime_error &) {
        return false; // no device computes this op on it
    }
    if (coded_buft == nullptr || device_of(coded_buft) != device || (is_cpu && !ggml_backend_buft_is_host(coded_buft))) {
        return false;
    }
    if (llama_entropy_has_device_layout(coded_buft)) {
        there.nb[2] = headers.at(ggml_get_name(coded)).device_size;
        there.nb[3] = there.nb[2]*there.ne[2];
    }
    *buft = coded_buft;
    *meta = there;
    if (std::find(fused.devices.begin(), fused.devices.end(), device) == fused.devices.end()) {
        fused.devices.push_back(device);
    }
    return true;
}

// ---- loading -----------------------------------------------------------------------------------------------------------------------

static bool is_as_surveyed(const ggml_entropy_header & a, const ggml_entropy_header & b) {
    return memcmp(a.magic, b.magic, sizeof(a.magic)) == 0 && a.version == b.version && a.kind == b.kind && a.slab_size == b.slab_size
        && a.n_cols == b.n_cols && a.n_rows == b.n_rows && a.n_slabs == b.n_slabs && a.scale_mode == b.scale_mode
        && a.offset_mode == b.offset_mode && a.tile_cols == b.tile_cols && a.device_size == b.device_size;
}

// The decoder of the CPU backend's kernel level; the portable one where there is none.
static ggml_entropy_decode_t fastest_decoder() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = cpu != nullptr ? ggml_backend_dev_backend_reg(cpu) : nullptr;
    const auto get = reg == nullptr ? nullptr :
        (ggml_entropy_decode_t (*)()) ggml_backend_reg_get_proc_address(reg, "ggml_backend_entropy_decoder");
    return get != nullptr ? get() : ggml_entropy_decode_units;
}

// Views of all slabs of a payload, after everything that a decoder relies on was checked; with check also hashes, unused bytes, every code.
llama_entropy_slabs llama_entropy::validate(const ggml_tensor * src, const uint8_t * data, bool check) const {
    const ggml_entropy_header & surveyed_header = headers.at(ggml_get_name(src));
    ggml_entropy_header header;
    memcpy(&header, data, sizeof(header));
    if (!is_as_surveyed(header, surveyed_header)) {
        throw_changed(src);
    }
    ggml_entropy_status status = ggml_entropy_validate(src->type, src->ne, data, ggml_nbytes(src));
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }
    const ggml_entropy_decode_t decode = fastest_decoder();
    llama_entropy_slabs slabs(src->ne[2]);
    for (int64_t i = 0; i < src->ne[2]; i++) {
        // the header in the view is the one that counts from here on: if it was valid and is not now, or says something else, somebody
        // writes
        status = ggml_entropy_open(data + i*src->nb[2], src->nb[2], &slabs[i]);
        if (status != GGML_ENTROPY_OK || !is_as_surveyed(slabs[i].header, surveyed_header)) {
            throw_changed(src);
        }
        slabs[i].decode = decode;
    }
    status = check ? llama_entropy_verify_slabs(slabs, data, src->nb[2], ggml_get_name(src)) : GGML_ENTROPY_OK;
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }
    return slabs;
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

// The payload as a decoder wants it, at a multiple of 8: where it is mapped, or read into buf.
static const uint8_t * bring_payload(
        const ggml_tensor * src, const uint8_t * mapped, llama_file & file, size_t offs, llama_entropy_buffer & buf) {
    if (mapped != nullptr && (uintptr_t) mapped % 8 == 0) {
        return mapped;
    }
    const size_t n_bytes = ggml_nbytes(src);
    uint8_t * to = buf.of(n_bytes);
    if (mapped != nullptr) {
        memcpy(to, mapped, n_bytes); // general.alignment below 8, or a GGUF inside another file
    } else {
        file.seek(offs, SEEK_SET);
        file.read_raw(to, n_bytes);
    }
    return to;
}

static void check_f16(const ggml_tensor * src, const llama_entropy_slabs & slabs, const char * why) {
    if (!std::all_of(slabs.begin(), slabs.end(), [](const ggml_entropy_view & slab) { return ggml_entropy_fits_f16(&slab); })) {
        throw std::runtime_error(format("tensor '%s' of type %s has weights beyond the range of F16, %s, or convert the model again",
            ggml_get_name(src), ggml_type_name(src->type), why));
    }
}

// Hand the slabs of src to sink(coded, slab0, bytes) in the device layout, some at a time: coded has type, shape and strides of those in
// hand, the first of which is slab0. Ends early if sink returns false, or if one cannot be made: see lanes.
static bool each_lanes(
        const ggml_tensor * src, const llama_entropy_slabs & slabs, llama_entropy_lanes * lanes, llama_entropy_buffer & buf,
        const std::function<bool(const ggml_tensor & coded, int64_t slab0, const uint8_t * bytes)> & sink) {
    const size_t  device_size = slabs[0].header.device_size;
    const int64_t n_slabs     = (int64_t) slabs.size();
    const int64_t n_batch     = lanes->batch(slabs);
    uint8_t * bytes = buf.of(n_batch*device_size);
    for (int64_t slab0 = 0; slab0 < n_slabs; slab0 += n_batch) {
        const int64_t slab1 = std::min(slab0 + n_batch, n_slabs);
        if (!lanes->make(slabs, slab0, slab1, bytes)) {
            return false;
        }
        ggml_tensor coded = *src;
        coded.ne[2] = slab1 - slab0;
        coded.nb[2] = device_size;
        coded.nb[3] = device_size*coded.ne[2];
        if (!sink(coded, slab0, bytes)) {
            return false;
        }
    }
    return true;
}

[[noreturn]] static void throw_no_lanes(const ggml_tensor * src, const llama_entropy_lanes & lanes, size_t device_size) {
    if (lanes.status != GGML_ENTROPY_OK) {
        throw_damaged(src, lanes.status);
    }
    const std::string needs = lanes.needed == 0 ? "has lanes that are too long" : format("needs %zu bytes", lanes.needed);
    throw std::runtime_error(format(
        "tensor '%s' of type %s: matrix %lld %s in the layout of the device, for which its header promises %zu bytes: "
        "convert the file again, or use mode load",
        ggml_get_name(src), ggml_type_name(src->type), (long long) lanes.misfit, needs.c_str(), device_size));
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
    bool done = true;
    if (has_device_layout(dst)) {
        const uint8_t * coded = bring_payload(src, mapped, file, offs, payload_buf);
        const llama_entropy_slabs slabs = validate(src, coded, check);
        check_f16(src, slabs, "in which the device computes large batches: keep it on the CPU in mode fused");
        const auto upload = [&](const ggml_tensor & part, int64_t slab0, const uint8_t * bytes) {
            ggml_backend_tensor_set(dst, bytes, slab0*part.nb[2], part.nb[3]);
            return true;
        };
        if (!each_lanes(src, slabs, &lanes, device_buf, upload)) {
            throw_no_lanes(src, lanes, dst->nb[2]);
        }
        if (mapped != nullptr) {
            drop_pages(mapped, ggml_nbytes(src));
        }
    } else if (mapped != nullptr) {
        if ((uintptr_t) mapped % 8 != 0) {
            throw std::runtime_error(format("tensor '%s' of type %s: general.alignment is below 8, which mode fused needs where it maps the file: "
                "use --load-mode none (use_mmap=False) or mode load, or convert the file again", ggml_get_name(src), ggml_type_name(src->type)));
        }
        validate(src, mapped, check);
        done = false;
    } else {
        const bool is_host = ggml_backend_buffer_is_host(dst->buffer);
        uint8_t * to = is_host ? (uint8_t *) dst->data : payload_buf.of(ggml_nbytes(src));
        file.seek(offs, SEEK_SET);
        file.read_raw(to, ggml_nbytes(src));
        validate(src, to, check);
        if (!is_host) {
            ggml_backend_tensor_set(dst, to, 0, ggml_nbytes(src));
        }
    }
    fused.n_tensors++;
    fused.n_coded += ggml_nbytes(dst);
    return done;
}

void llama_entropy::load_decoded(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check) {
    const int64_t t_start = ggml_time_us();
    const size_t  n_plain = ggml_nbytes(dst);

    const uint8_t * coded = bring_payload(src, mapped, file, offs, payload_buf);
    const llama_entropy_slabs slabs = validate(src, coded, check);
    if (dst->type == GGML_TYPE_F16) {
        check_f16(src, slabs, "to which mode load decodes it: use mode fused (GGML_ENTROPY_MODE=fused)");
    }

    // also for a device: decoding on the host is quicker than making the device's layout first (docs/cuda.md of EntroLLM-GGUF)
    const bool in_place = ggml_backend_buffer_is_host(dst->buffer);
    uint8_t * rows = in_place ? (uint8_t *) dst->data : plain_buf.of(n_plain);
    ggml_entropy_status status;
    const int n_threads = llama_entropy_decode_slabs(slabs, dst->type, rows, &status);
    if (status != GGML_ENTROPY_OK) {
        throw_damaged(src, status);
    }
    if (!in_place) {
        ggml_backend_tensor_set(dst, rows, 0, n_plain);
    }
    if (mapped != nullptr) {
        drop_pages(mapped, ggml_nbytes(src));
    }

    decoded.n_tensors++;
    decoded.n_threads = std::max(decoded.n_threads, n_threads);
    decoded.n_coded  += ggml_nbytes(src);
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
        LLAMA_LOG_INFO("%s: decoded %d entropy-coded tensors, %.2f MiB -> %.2f MiB, in %.2f s with %d threads (mode %s)\n", "llama_entropy",
            decoded.n_tensors, decoded.n_coded/1024.0/1024.0, decoded.n_plain/1024.0/1024.0, decoded.seconds, decoded.n_threads,
            reason().c_str());
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
