// SPDX-License-Identifier: MIT
//
// Entropy-coded tensors (EQ8, EQ4, EBF16) in the model loader.
//
// A tensor can live in memory in two ways, EBF16 in the first only. Load mode: validated and decoded once, while the model is loaded, into
// the stock type that holds it (ggml_entropy_plain_type); every backend then runs its own kernels at full speed. Fused mode: it stays
// coded, and kernels decode it; on the CPU as it is in the file, mapped if the model is; on another device in the device layout
// (ggml-entropy-lanes.h), which is made while the tensor is uploaded. llama_entropy::stays_coded is the one place that decides.
//
// How it hangs together: create_tensor first asks set_plain_type, which turns the tensor's meta data into the plain type, chooses a buffer
// type for that, and then asks stays_coded whether to go back to the coded type. Tensors whose bytes in memory differ from those in the
// file go into contexts of their own, which are never mapped (ctx_key::converted). load_all_data calls load for all. Progress and totals
// count bytes of the file throughout; only the buffers know the size in memory. Both sizes stand in the headers, so that buffers are
// planned without reading the codes.
//
// A file is hostile until ggml_entropy_validate has seen it: load calls it for every tensor, whatever --check-tensors says.

#pragma once

#include "llama.h"

#include "llama-arch.h"
#include "llama-entropy-codec.h"

#include "ggml-backend.h"
#include "../ggml/src/ggml-entropy.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

struct llama_file;
struct llama_model_loader;

// Do buffers of this type hold entropy-coded tensors in the device layout?
bool llama_entropy_has_device_layout(ggml_backend_buffer_type_t buft);

// Is dst, a tensor of the model, made from src, its weight in the file (may be nullptr): decoded, or brought into the device layout?
bool llama_entropy_is_converted(const ggml_tensor * src, const ggml_tensor * dst);

// Throws one clear line if tensor is entropy-coded. For the places that would read its bytes as something else.
void llama_entropy_check_plain(const ggml_tensor * tensor, const char * why);

// Throws one clear line for an entropy-coded tensor that the model takes neither for the weights of a matrix product nor for a table of
// rows: norms, biases, scales, integers. Even the stock type of load mode would not do for them. kind: which tensor of the model it is; op:
// where it is used.
void llama_entropy_check_use(const std::string & name, llm_tensor kind, ggml_op op);

// The same for llama-quantize, which can neither read nor write these types.
void llama_entropy_check_quantize(const ggml_tensor * tensor, ggml_type target);

// All weights of a tensor that was loaded as floats, row by row; data: a copy of its bytes. False if its type is not entropy-coded.
bool llama_entropy_to_float(const ggml_tensor * tensor, const void * data, float * out);

struct llama_entropy {
    ~llama_entropy();

    // If the files are to be mapped, read the entropy-coded tensors into the page cache from here on, by a thread of its own, while the
    // vocabulary is built. Stock tensors are read when they are mapped, behind the vocabulary. Of ours, headers were read before that, one
    // by one, and pages that are there already make Linux read the others in small pieces: mapping takes twice as long.
    void read_ahead(const llama_model_loader & ml);

    // GGML_ENTROPY_MODE in the environment, or the metadata override entropy.mode, which wins.
    enum mode_t { MODE_AUTO, MODE_LOAD, MODE_FUSED };

    // If tensor, a copy of the file's, is entropy-coded: give it the plain type and its strides, and return true.
    // Throws on a bad switch or header, and if the model wants another shape than the file's (reshape).
    bool set_plain_type(const llama_model_loader & ml, bool reshape, ggml_tensor * tensor);

    // The rule (docs/runtime-modes.md). kind: which tensor of the model it is; coded: the tensor as in the file; *buft: the buffer type
    // that its plain type gets. If it is to stay coded, *buft becomes the buffer type for it, as choose_buft finds it, and *meta the tensor
    // as it will be there: as in the file, or with the strides of the device layout. Throws if the switch asks for what the device cannot
    // do.
    bool stays_coded(
        llm_tensor kind, const ggml_tensor * coded, ggml_backend_buffer_type_t * buft,
        const std::function<ggml_backend_buffer_type_t(ggml_tensor *)> & choose_buft, ggml_tensor * meta);

    // Bring the payload of src to dst if it is entropy-coded: validate it, then decode it if dst has the plain type, or make the device
    // layout if dst's buffer has that. mapped: the payload in memory, or nullptr to read it from file at offs. check: also verify hash and
    // codes. Throws with the tensor's name, the reason and the remedy. False if the caller has to go on: src is of a stock type, or mapped
    // is valid and is to be mapped or copied to dst.
    bool load(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check);

    // One line about what was decoded and one about what stayed, if anything.
    void log_summary() const;

private:
    bool        surveyed    = false;
    mode_t      mode        = MODE_AUTO;
    std::string mode_origin;            // who chose it
    std::string auto_reason;            // why auto answers for the CPU as it does
    bool        fits        = true;     // would all tensors fit in the CPU's memory, decoded?
    std::unordered_map<std::string, ggml_entropy_header> headers; // of the first slab of each entropy-coded tensor of the file

    struct {
        int    n_tensors = 0;
        size_t n_coded   = 0; // bytes
        size_t n_plain   = 0;
        int    n_threads = 0; // most
        double seconds   = 0;
    } decoded;

    struct {
        int    n_tensors = 0;
        size_t n_coded   = 0; // bytes in memory
        std::vector<ggml_backend_dev_t> devices; // that compute on them
    } fused;

    llama_entropy_buffer payload_buf, plain_buf, device_buf; // of the tensor in hand
    llama_entropy_lanes  lanes;

    std::thread       reader; // of read_ahead
    std::atomic<bool> stop_reader{ false };

    void survey(const llama_model_loader & ml);
    void read_mode(const llama_model_loader & ml);
    std::vector<ggml_entropy_view> validate(const ggml_tensor * src, const uint8_t * data, bool check) const;
    bool load_coded(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check);
    void load_decoded(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check);
    std::string reason() const;
};
