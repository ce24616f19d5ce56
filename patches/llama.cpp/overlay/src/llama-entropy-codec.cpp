// SPDX-License-Identifier: MIT
//
// See llama-entropy-codec.h. Order of this file: threads, decoding and verification, the device layout.

#include "llama-entropy-codec.h"

#include "../ggml/src/ggml-entropy-lanes.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

// Decoding takes half a nanosecond per weight or more, so a chunk is some 0.1 ms: far more than taking it costs, and starting a thread for
// every THREAD_WEIGHTS is worth its 20 microseconds.
static constexpr int64_t CHUNK_WEIGHTS  = 128*1024;
static constexpr int64_t THREAD_WEIGHTS = 256*1024;

// Slabs are brought into the device layout together up to this many weights.
static constexpr int64_t BATCH_WEIGHTS  = 256*1024*1024;

// ---- threads -----------------------------------------------------------------------------------------------------------------------

// Call work for 0 .. n_items - 1, with threads that take them from a counter, as many as n_weights are worth. The first status that is not
// OK ends it and becomes *result. Returns the number of threads.
static int run_items(
        int64_t n_items, int64_t n_weights, ggml_entropy_status * result, const std::function<ggml_entropy_status(int64_t)> & work) {
    std::atomic<int64_t> next{0};
    std::atomic<int>     first_bad{GGML_ENTROPY_OK};

    const auto take = [&]() {
        for (int64_t i = next++; i < n_items && first_bad == GGML_ENTROPY_OK; i = next++) {
            const ggml_entropy_status status = work(i);
            if (status != GGML_ENTROPY_OK) {
                first_bad = status;
            }
        }
    };

    const int64_t n_useful = std::min(n_items, n_weights/THREAD_WEIGHTS + 1);
    const int64_t n_wanted = std::min<int64_t>(n_useful, std::max(1u, std::thread::hardware_concurrency()));

    std::vector<std::thread> workers;
    workers.reserve(n_wanted);
    for (int64_t i = 1; i < n_wanted; i++) {
        try {
            workers.emplace_back(take);
        } catch (const std::system_error &) {
            break; // no more threads to be had: go on with fewer
        }
    }
    take();
    for (auto & worker : workers) {
        worker.join();
    }
    *result = (ggml_entropy_status) first_bad.load();
    return (int) workers.size() + 1;
}

// The row groups of several matrices in chunks of about CHUNK_WEIGHTS weights.
struct row_chunks {
    int64_t n_groups; // of a matrix
    int64_t step;     // row groups of a chunk
    int64_t n_steps;  // chunks of a matrix
    int64_t n_chunks;

    row_chunks(const ggml_entropy_header & header, int64_t n_matrices, int64_t group_rows) :
        n_groups((header.n_rows + group_rows - 1)/group_rows),
        step    (std::max<int64_t>(1, CHUNK_WEIGHTS/(group_rows*header.n_cols))),
        n_steps ((n_groups + step - 1)/step),
        n_chunks(n_steps*n_matrices) {}

    int64_t matrix(int64_t chunk) const { return chunk/n_steps; }
    int64_t group0(int64_t chunk) const { return chunk%n_steps*step; }
    int64_t group1(int64_t chunk) const { return std::min(group0(chunk) + step, n_groups); }
};

static int64_t count_weights(const ggml_entropy_header & header) {
    return (int64_t) header.n_cols*header.n_rows;
}

// ---- decoding and verification -----------------------------------------------------------------------------------------------------

int llama_entropy_decode_slabs(const llama_entropy_slabs & slabs, ggml_type plain, uint8_t * dst, ggml_entropy_status * result) {
    const ggml_entropy_header & first = slabs[0].header;
    const size_t     row_size = ggml_row_size(plain, first.n_cols);
    const row_chunks chunks(first, slabs.size(), GGML_ENTROPY_GROUP_ROWS);
    return run_items(chunks.n_chunks, count_weights(first)*slabs.size(), result, [&](int64_t chunk) {
        const int64_t i      = chunks.matrix(chunk);
        const int64_t group0 = chunks.group0(chunk);
        return ggml_entropy_decode_groups_plain(
            &slabs[i], group0, chunks.group1(chunk), plain, dst + (i*first.n_rows + group0*GGML_ENTROPY_GROUP_ROWS)*row_size);
    });
}

ggml_entropy_status llama_entropy_verify_slabs(
        const llama_entropy_slabs & slabs, const uint8_t * data, size_t slab_size, const char * name) {
    const ggml_entropy_header & first = slabs[0].header;
    const row_chunks chunks(first, slabs.size(), GGML_ENTROPY_GROUP_ROWS);
    ggml_entropy_status result;
    run_items(chunks.n_chunks, count_weights(first)*slabs.size(), &result, [&](int64_t chunk) {
        const int64_t i      = chunks.matrix(chunk);
        const int64_t group0 = chunks.group0(chunk);
        const uint8_t * slab = data + i*slab_size;
        ggml_entropy_status status = GGML_ENTROPY_OK;
        if (group0 == 0) {
            status = ggml_entropy_verify_hash(&slabs[i], slab, ggml_entropy_seed(name, i));
            if (status == GGML_ENTROPY_OK) {
                status = ggml_entropy_verify_padding(&slabs[i], slab);
            }
        }
        return status != GGML_ENTROPY_OK ? status : ggml_entropy_verify_groups(&slabs[i], group0, chunks.group1(chunk));
    });
    return result;
}

// ---- the device layout -------------------------------------------------------------------------------------------------------------

static_assert(GGML_ENTROPY_LANES == 2*GGML_ENTROPY_GROUP_ROWS, "a group of lanes is two row groups of the file");

namespace {

// Slabs on their way, in passes over all of them: codes are decoded and counted; each slab gets a code; lanes are measured; all but the
// bitstreams is written; then the bitstreams.
struct lanes_maker {
    struct slab {
        uint64_t counts[256] = {};
        int64_t  max_words   = 0;
        ggml_entropy_lanes_plan plan;
        std::vector<uint8_t>    lane_words;
        ggml_entropy_spec       spec = {};
    };

    const ggml_entropy_view   * views;
    const ggml_entropy_header & first; // slabs differ in scales, codes and sizes of their parts only
    const ggml_type             type;
    const int64_t               n_slabs;
    const int64_t               n_weights; // of a slab
    const row_chunks            chunks;    // of 32 rows
    std::vector<slab>           slabs;
    int8_t                    * codes;     // of all slabs
    std::mutex                  mutex;     // of what the chunks of a slab add to
    uint8_t                   * to;
    ggml_entropy_status         status = GGML_ENTROPY_OK;
    int                         n_threads = 0;

    lanes_maker(const ggml_entropy_view * views, int64_t n_slabs, int8_t * codes, uint8_t * to) :
        views(views), first(views[0].header), type(first.kind == GGML_ENTROPY_KIND_EQ8 ? GGML_TYPE_EQ8 : GGML_TYPE_EQ4), n_slabs(n_slabs),
        n_weights(count_weights(first)), chunks(first, n_slabs, GGML_ENTROPY_LANES), slabs(n_slabs), codes(codes), to(to) {
        for (auto & slab : slabs) { // here, since a worker could not tell that memory is short
            slab.lane_words.resize(chunks.n_groups*((first.n_cols + first.tile_cols - 1)/first.tile_cols)*GGML_ENTROPY_LANES);
        }
    }

    bool each_chunk(ggml_entropy_status (lanes_maker::*work)(int64_t i, int64_t group0, int64_t group1)) {
        n_threads = run_items(chunks.n_chunks, n_weights*n_slabs, &status, [&](int64_t chunk) {
            return (this->*work)(chunks.matrix(chunk), chunks.group0(chunk), chunks.group1(chunk));
        });
        return status == GGML_ENTROPY_OK;
    }

    bool each_slab(ggml_entropy_status (lanes_maker::*work)(int64_t i)) {
        run_items(n_slabs, n_weights*n_slabs, &status, [&](int64_t i) { return (this->*work)(i); });
        return status == GGML_ENTROPY_OK;
    }

    const int8_t * codes_of(int64_t i) const {
        return codes + i*n_weights;
    }

    ggml_entropy_status decode(int64_t i, int64_t group0, int64_t group1) {
        int8_t * q = codes + i*n_weights + group0*GGML_ENTROPY_LANES*first.n_cols;
        ggml_entropy_status result = ggml_entropy_decode_groups(&views[i], 2*group0, std::min(2*group1, views[i].n_groups), q);
        uint64_t counts[256] = {};
        if (result == GGML_ENTROPY_OK) {
            result = ggml_entropy_lanes_count(type, first.n_rows, first.n_cols, codes_of(i), group0, group1, counts);
        }
        std::lock_guard<std::mutex> lock(mutex);
        for (int u = 0; u < 256; u++) {
            slabs[i].counts[u] += counts[u];
        }
        return result;
    }

    ggml_entropy_status plan(int64_t i) {
        return ggml_entropy_lanes_plan_code(slabs[i].counts, &slabs[i].plan);
    }

    ggml_entropy_status measure(int64_t i, int64_t group0, int64_t group1) {
        int64_t max_words = 0;
        const ggml_entropy_status result = ggml_entropy_lanes_measure(
            type, first.n_rows, first.n_cols, codes_of(i), &slabs[i].plan, first.tile_cols, group0, group1,
            slabs[i].lane_words.data(), &max_words);
        std::lock_guard<std::mutex> lock(mutex);
        slabs[i].max_words = std::max(slabs[i].max_words, max_words);
        return result;
    }

    // Bytes of slab i; 0 if a lane is too long.
    size_t size(int64_t i) {
        const ggml_entropy_view & view = views[i];
        ggml_entropy_spec & spec = slabs[i].spec;
        spec.type      = type;
        spec.n_cols    = first.n_cols;
        spec.n_rows    = first.n_rows;
        spec.n_slabs   = first.n_slabs;
        spec.scales    = view.scales != nullptr ? view.scales : &view.header.scale;
        spec.n_scales  = view.scales != nullptr ? first.n_rows : 1;
        spec.offsets   = view.offsets != nullptr ? view.offsets : &view.header.offset;
        spec.n_offsets = view.offsets != nullptr ? first.n_rows : first.offset_mode == GGML_ENTROPY_OFFSET_ONE ? 1 : 0;
        spec.tile_cols = first.tile_cols;
        return slabs[i].max_words > GGML_ENTROPY_LANES_MAX_WORDS ? 0 : ggml_entropy_lanes_size(&spec, slabs[i].lane_words.data());
    }

    ggml_entropy_status begin(int64_t i) {
        uint8_t * slab = to + i*first.device_size;
        std::memset(slab, 0, first.device_size);
        return ggml_entropy_lanes_begin(&slabs[i].spec, &slabs[i].plan, slabs[i].lane_words.data(), slab, first.device_size);
    }

    ggml_entropy_status encode(int64_t i, int64_t group0, int64_t group1) {
        return ggml_entropy_lanes_encode_groups(&slabs[i].plan, codes_of(i), group0, group1, to + i*first.device_size);
    }
};

} // namespace

int64_t llama_entropy_lanes::batch(const llama_entropy_slabs & slabs) {
    return std::min<int64_t>(slabs.size(), std::max<int64_t>(1, BATCH_WEIGHTS/count_weights(slabs[0].header)));
}

bool llama_entropy_lanes::make(const llama_entropy_slabs & slabs, int64_t slab0, int64_t slab1, uint8_t * to) {
    int8_t * q = (int8_t *) codes.of(count_weights(slabs[slab0].header)*(slab1 - slab0));
    lanes_maker maker(slabs.data() + slab0, slab1 - slab0, q, to);
    bool ok = maker.each_chunk(&lanes_maker::decode) && maker.each_slab(&lanes_maker::plan) && maker.each_chunk(&lanes_maker::measure);
    for (int64_t i = 0; ok && i < slab1 - slab0; i++) {
        const size_t size = maker.size(i);
        ok = size != 0 && size <= maker.first.device_size;
        if (!ok) {
            misfit = slab0 + i;
            needed = size;
        }
    }
    ok = ok && maker.each_slab(&lanes_maker::begin) && maker.each_chunk(&lanes_maker::encode);
    status    = maker.status;
    n_threads = std::max(n_threads, maker.n_threads);
    return ok;
}
