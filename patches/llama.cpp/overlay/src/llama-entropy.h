// SPDX-License-Identifier: MIT
//
// Entropy-coded tensors (EQ8, EQ4) in the model loader.
//
// A tensor can live in memory in two ways. Load mode: validated and decoded once, while the model is loaded, into the stock type that
// holds it (ggml_entropy_plain_type); every backend then runs its own kernels at full speed. Fused mode: the payload stays as it is and the
// kernels decode; no device declares support for that yet, so it is refused. llama_entropy::decode_at_load is the one place that decides.
//
// How it hangs together: create_tensor asks set_plain_type, which turns the tensor's meta data into the plain type before a buffer
// type is chosen; such tensors go into contexts of their own, which are never mapped (ctx_key::decoded). load_all_data then calls load.
// Progress and totals count bytes of the file throughout; only the buffers know the decoded size.
//
// A file is hostile until ggml_entropy_validate has seen it: load calls it for every tensor, whatever --check-tensors says.

#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>

struct llama_file;

// Is dst, a tensor of the model, to be decoded from src, its weight in the file (may be nullptr)?
bool llama_entropy_is_decoded(const ggml_tensor * src, const ggml_tensor * dst);

// Throws one clear line if tensor is entropy-coded. For the places that would read its bytes as something else.
void llama_entropy_check_plain(const ggml_tensor * tensor, const char * why);

// The same for llama-quantize, which can neither read nor write these types.
void llama_entropy_check_quantize(const ggml_tensor * tensor, ggml_type target);

struct llama_entropy {
    using kv_overrides = std::unordered_map<std::string, llama_model_kv_override>;

    // GGML_ENTROPY_MODE in the environment, or the metadata override entropy.mode, which wins.
    enum mode_t { MODE_UNREAD, MODE_AUTO, MODE_LOAD, MODE_FUSED };

    // If tensor, a copy of the file's, is to be decoded at load: give it the plain type and its strides, and return true.
    // Reads the header again, from file at offs. Throws on a bad switch or header, and if the model wants another shape than the file's.
    bool set_plain_type(const kv_overrides & overrides, llama_file & file, size_t offs, bool reshape, ggml_tensor * tensor);

    // Validate the payload of src, decode it into dst, which was made by set_plain_type. mapped: the payload in memory, or nullptr to read
    // it from file at offs. check: also verify hash and bitstream. Throws with the tensor's name, the reason and the remedy.
    void load(const ggml_tensor * src, ggml_tensor * dst, const uint8_t * mapped, llama_file & file, size_t offs, bool check);

    // One line about what load did, if it did anything.
    void log_summary() const;

private:
    mode_t      mode = MODE_UNREAD;
    std::string mode_reason;

    int    n_tensors     = 0;
    int    n_threads_max = 0;
    size_t n_bytes_coded = 0;
    size_t n_bytes_plain = 0;
    double seconds       = 0;

    void read_mode(const kv_overrides & overrides);
    bool decode_at_load(const ggml_tensor * tensor, ggml_backend_buffer_type_t buft) const;
};
