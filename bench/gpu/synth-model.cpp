// SPDX-License-Identifier: MIT
//
// A llama model of random weights, of real shape, to measure speed and memory with where no model can be downloaded.
//
//     synth-model OUT.gguf 1B|8B Q8_0|Q6_K|Q4_0|Q4_K_M|IQ4_XS|EQ8|EQ8-4.5|EQ4
//
// EQ8 codes have 5.3 bits of entropy (EQ8-4.5: 4.5), EQ4 codes 3.0, about what EQ8 and EQ4 files of real models have. Q4_K_M is that
// recipe's mixture: Q6_K for the output and half of attn_v and ffn_down. All layers share their bytes in the file's making, not in the
// file.

#include "ggml.h"
#include "gguf.h"
#include "payload.h"

#include <cstring>
#include <map>
#include <string>
#include <tuple>

struct shape {
    uint32_t n_embd, n_ff, n_layer, n_head, n_head_kv, n_vocab;
};

struct builder {
    gguf_context * gguf;
    ggml_context * ctx;
    double         sigma; // of codes
    std::map<std::tuple<int, int64_t, int64_t>, std::vector<uint8_t>> made; // by type and shape

    std::vector<uint8_t> & data(ggml_type type, int64_t n_rows, int64_t n_cols) {
        std::vector<uint8_t> & bytes = made[{ type, n_rows, n_cols }];
        if (!bytes.empty()) {
            return bytes;
        }
        if (ggml_entropy_is_type(type)) {
            const std::vector<int8_t> q = make_codes(type, n_rows, n_cols, sigma);
            return bytes = coded_matrix(type, n_rows, n_cols, ggml_entropy_lanes_default_tile_cols(n_rows, n_cols), q, false).planes();
        }
        const int64_t n_random = std::min<int64_t>(n_rows, 64);
        const size_t row_size = ggml_row_size(type, n_cols);
        std::mt19937 generator(1);
        std::normal_distribution<float> normal(0.0f, 0.02f);
        std::vector<float> x(n_random*n_cols);
        for (float & value : x) {
            value = type == GGML_TYPE_F32 ? 1.0f : normal(generator); // F32: norms
        }
        bytes.resize(row_size*n_rows);
        if (type == GGML_TYPE_F32) {
            std::memcpy(bytes.data(), x.data(), row_size*n_random);
        } else {
            ggml_quantize_chunk(type, x.data(), bytes.data(), 0, n_random, n_cols, nullptr);
        }
        for (int64_t r = n_random; r < n_rows; r++) {
            std::memcpy(bytes.data() + r*row_size, bytes.data() + r%n_random*row_size, row_size);
        }
        return bytes;
    }

    void add(const std::string & name, ggml_type type, int64_t n_cols, int64_t n_rows) {
        std::vector<uint8_t> & bytes = data(type, n_rows, n_cols);
        ggml_tensor * t = n_rows == 1 ? ggml_new_tensor_1d(ctx, type, n_cols) : ggml_new_tensor_2d(ctx, type, n_cols, n_rows);
        ggml_set_name(t, name.c_str());
        if (ggml_entropy_is_type(type)) {
            t->nb[1] = n_cols;
            t->nb[2] = t->nb[3] = bytes.size();
        }
        t->data = bytes.data();
        gguf_add_tensor(gguf, t);
    }

    // Not by ggml: the hash of a coded tensor takes in its name, so bytes that several share are changed for each.
    bool write(const char * path) const {
        FILE * file = fopen(path, "wb");
        if (file == nullptr) {
            return false;
        }
        bool ok = gguf_write_to_file_ptr(gguf, file, /*only_meta =*/ true);
        const std::vector<uint8_t> zeros(gguf_get_alignment(gguf), 0);
        for (int64_t i = 0; ok && i < gguf_get_n_tensors(gguf); i++) {
            const ggml_tensor * t = ggml_get_tensor(ctx, gguf_get_tensor_name(gguf, i));
            if (ggml_entropy_is_type(t->type)) {
                require(ggml_entropy_finish(t->data, ggml_entropy_seed(t->name, 0)), "finish");
            }
            const size_t n_bytes   = ggml_nbytes(t);
            const size_t n_padding = GGML_PAD(n_bytes, zeros.size()) - n_bytes;
            ok = fwrite(t->data, 1, n_bytes, file) == n_bytes && fwrite(zeros.data(), 1, n_padding, file) == n_padding;
        }
        return fclose(file) == 0 && ok;
    }
};

int main(int argc, char ** argv) {
    const std::map<std::string, shape> shapes = {
        { "1B", { 2048, 8192, 16, 32, 8, 128256 } },
        { "8B", { 4096, 14336, 32, 32, 8, 128256 } },
        { "tiny", { 256, 512, 2, 4, 2, 512 } },
    };
    const std::map<std::string, ggml_type> types = {
        { "Q8_0", GGML_TYPE_Q8_0 }, { "Q6_K", GGML_TYPE_Q6_K }, { "Q4_0", GGML_TYPE_Q4_0 }, { "Q4_K_M", GGML_TYPE_Q4_K },
        { "IQ4_XS", GGML_TYPE_IQ4_XS }, { "EQ8", GGML_TYPE_EQ8 }, { "EQ8-4.5", GGML_TYPE_EQ8 }, { "EQ4", GGML_TYPE_EQ4 },
    };
    if (argc != 4 || shapes.count(argv[2]) == 0 || types.count(argv[3]) == 0) {
        fprintf(stderr, "usage: synth-model OUT.gguf 1B|8B|tiny Q8_0|Q6_K|Q4_0|Q4_K_M|IQ4_XS|EQ8|EQ8-4.5|EQ4\n");
        return 2;
    }
    const shape s = shapes.at(argv[2]);
    const ggml_type type = types.at(argv[3]);
    const bool k_m = type == GGML_TYPE_Q4_K;
    const double sigma = type == GGML_TYPE_EQ4 ? 1.95 : argv[3] == std::string("EQ8-4.5") ? 5.5 : 9.5;

    builder b = { gguf_init_empty(), ggml_init({ ggml_tensor_overhead()*(s.n_layer*10 + 8), nullptr, true }), sigma, {} };
    gguf_set_val_str(b.gguf, "general.architecture", "llama");
    gguf_set_val_str(b.gguf, "general.name", (std::string("random ") + argv[2]).c_str());
    gguf_set_val_u32(b.gguf, "llama.block_count", s.n_layer);
    gguf_set_val_u32(b.gguf, "llama.context_length", 8192);
    gguf_set_val_u32(b.gguf, "llama.embedding_length", s.n_embd);
    gguf_set_val_u32(b.gguf, "llama.feed_forward_length", s.n_ff);
    gguf_set_val_u32(b.gguf, "llama.attention.head_count", s.n_head);
    gguf_set_val_u32(b.gguf, "llama.attention.head_count_kv", s.n_head_kv);
    gguf_set_val_u32(b.gguf, "llama.vocab_size", s.n_vocab);
    gguf_set_val_f32(b.gguf, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_set_val_f32(b.gguf, "llama.rope.freq_base", 500000.0f);
    gguf_set_val_str(b.gguf, "tokenizer.ggml.model", "no_vocab");

    const int64_t n_kv = (int64_t) s.n_embd/s.n_head*s.n_head_kv;
    b.add("token_embd.weight", type, s.n_embd, s.n_vocab);
    b.add("output_norm.weight", GGML_TYPE_F32, s.n_embd, 1);
    b.add("output.weight", k_m ? GGML_TYPE_Q6_K : type, s.n_embd, s.n_vocab);
    for (uint32_t i = 0; i < s.n_layer; i++) {
        const std::string block = "blk." + std::to_string(i) + ".";
        const bool more = k_m && (i < s.n_layer/8 || i >= 7*s.n_layer/8 || (i - s.n_layer/8)%3 == 2);
        b.add(block + "attn_norm.weight",   GGML_TYPE_F32, s.n_embd, 1);
        b.add(block + "attn_q.weight",      type, s.n_embd, s.n_embd);
        b.add(block + "attn_k.weight",      type, s.n_embd, n_kv);
        b.add(block + "attn_v.weight",      more ? GGML_TYPE_Q6_K : type, s.n_embd, n_kv);
        b.add(block + "attn_output.weight", type, s.n_embd, s.n_embd);
        b.add(block + "ffn_norm.weight",    GGML_TYPE_F32, s.n_embd, 1);
        b.add(block + "ffn_gate.weight",    type, s.n_embd, s.n_ff);
        b.add(block + "ffn_up.weight",      type, s.n_embd, s.n_ff);
        b.add(block + "ffn_down.weight",    more ? GGML_TYPE_Q6_K : type, s.n_ff, s.n_embd);
    }
    if (!b.write(argv[1])) {
        fprintf(stderr, "%s: cannot be written\n", argv[1]);
        return 1;
    }
    gguf_free(b.gguf);
    ggml_free(b.ctx);
    return 0;
}
