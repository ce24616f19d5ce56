// SPDX-License-Identifier: MIT
//
// A GPU block on the CPU, slow and suspicious: every thread is a fiber that runs until it must wait for its warp or block. One header,
// since fibers, checked memory and intrinsics know each other. It runs the kernels of ggml-cuda/entropy/ as they are (entropy-device.cuh
// says what they may use), and stops at
// - an access outside of the shared memory of the block or of the global memory the test has named,
// - a misaligned access,
// - threads of a warp that meet in different operations, or at different numbers of them (a deadlock on a GPU),
// - a kernel that was launched early and touches, before grid_wait, what other kernels write or read, or ever by a load meant for what
//   never changes.
// Asynchronous copies land as late as they may, at the wait that lets their group land, so that a missing wait shows; or, if `early`, at
// once, so that a copy over something that is still needed shows.
// Not modelled: races between threads without a meeting between them, except as far as the order of fibers shows them; run with both
// orders.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <stdexcept>
#include <vector>

#define ENTROPY_DEVICE   static inline
#define ENTROPY_MEMBER   inline
#define ENTROPY_SLOW     static
#define ENTROPY_UNROLL
#define ENTROPY_NOUNROLL
#define __global__
#define __launch_bounds__(...)

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4  { int32_t  x, y, z, w; };
struct alignas(8) int2  { int32_t  x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return { x, y, z, w }; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return { x, y }; }
static inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
static inline int4  make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return { x, y, z, w }; }
static inline int2  make_int2(int32_t x, int32_t y) { return { x, y }; }

struct dim3 {
    uint32_t x, y, z;
    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

struct copy {
    uint8_t    * to;
    const void * from;
    int          n;
};

struct thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint32_t id   = 0;
    bool     done = false;
    bool     waited = false; // grid_wait
    std::vector<std::vector<copy>> groups; // asynchronous copies, oldest group first
    std::vector<copy>              open;   // not committed
};

// A meeting of threads: the last to come computes the result.
struct meeting {
    int         n_threads = 0;
    int         n_here    = 0;
    uint64_t    round     = 0;
    const char * what     = nullptr;
    uint32_t    values[1024];
    uint32_t    kept[1024]; // of the last round, until the next is complete
    uint32_t    result    = 0;
};

struct block {
    std::vector<thread>  threads;
    std::vector<meeting> warps;
    meeting              all;
    std::vector<uint8_t> shared;
    thread             * current = nullptr;
    ucontext_t           scheduler;
    std::function<void()> body;
    std::string          error;
};

inline block * now = nullptr;
inline dim3 block_idx, block_dim, grid_dim;
inline bool backwards = false;
inline bool early     = false;
inline bool unwaited  = false; // the kernel was launched early
inline std::map<uintptr_t, size_t> memory; // global memory that kernels may touch
inline std::map<uintptr_t, size_t> moving; // of that, what other kernels write or read

[[noreturn]] inline void fail(const std::string & what) {
    now->error = what + " (block " + std::to_string(block_idx.x) + "," + std::to_string(block_idx.y) + "," + std::to_string(block_idx.z) +
        ", thread " + std::to_string(now->current->id) + ")";
    now->current->done = true;
    swapcontext(&now->current->context, &now->scheduler);
    std::abort();
}

inline bool within(const std::map<uintptr_t, size_t> & all, uintptr_t at, size_t n) {
    const auto it = all.upper_bound(at);
    return it != all.begin() && at + n <= std::prev(it)->first + std::prev(it)->second;
}

inline void check_global(const void * p, size_t n, size_t align, bool constant = false) {
    const uintptr_t at = (uintptr_t) p;
    if (!within(memory, at, n)) {
        fail("global access out of bounds");
    }
    if (unwaited && within(moving, at, n) && (constant || !now->current->waited)) {
        fail(constant ? "what other kernels write is read as if it were constant" : "global access before grid_wait");
    }
    if (at % align != 0) {
        fail("misaligned global access");
    }
}

inline uint8_t * check_shared(uint32_t at, size_t n, size_t align) {
    if (at + n > now->shared.size()) {
        fail("shared access out of bounds");
    }
    if (at % align != 0) {
        fail("misaligned shared access");
    }
    return now->shared.data() + at;
}

inline void pause() {
    swapcontext(&now->current->context, &now->scheduler);
}

inline uint32_t meet(meeting & m, uint32_t place, const char * what, uint32_t value, uint32_t (*combine)(const uint32_t *, int)) {
    if (m.n_here == 0) {
        m.what = what;
    } else if (m.what != what) {
        fail(std::string("threads meet in ") + m.what + " and in " + what);
    }
    m.values[place] = value;
    const uint64_t round = m.round;
    if (++m.n_here == m.n_threads) {
        m.result = combine != nullptr ? combine(m.values, m.n_threads) : 0;
        std::copy(m.values, m.values + m.n_threads, m.kept);
        m.n_here = 0;
        m.round++;
    } else {
        while (m.round == round) {
            pause();
        }
    }
    return m.result;
}

inline uint32_t meet_warp(const char * what, uint32_t value, uint32_t (*combine)(const uint32_t *, int)) {
    return meet(now->warps[now->current->id / 32], now->current->id % 32, what, value, combine);
}

inline void enter() {
    try {
        now->body();
    } catch (const std::exception & e) {
        now->error = e.what();
    }
    now->current->done = true;
    swapcontext(&now->current->context, &now->scheduler);
}

inline void run_block(uint32_t n_threads, size_t n_shared, const std::function<void()> & body) {
    block b;
    b.body = body;
    b.shared.assign(n_shared, 0xEE); // nothing relies on zeros
    b.threads.resize(n_threads);
    b.warps.resize((n_threads + 31) / 32);
    for (size_t w = 0; w < b.warps.size(); w++) {
        b.warps[w].n_threads = (int) std::min<size_t>(32, n_threads - w*32);
    }
    b.all.n_threads = (int) n_threads;
    now = &b;
    constexpr size_t stack_size = 64*1024;
    for (uint32_t i = 0; i < n_threads; i++) {
        thread & t = b.threads[i];
        t.id = i;
        t.stack.reset(new char[stack_size]);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp   = t.stack.get();
        t.context.uc_stack.ss_size = stack_size;
        t.context.uc_link          = nullptr;
        makecontext(&t.context, enter, 0);
    }
    for (bool alive = true; alive; ) {
        alive = false;
        uint64_t rounds = 0, rounds_after = 0;
        size_t n_alive = 0;
        const auto count = [&b, n_threads]() {
            uint64_t n = b.all.round*n_threads + b.all.n_here; // grows with every meeting
            for (const meeting & m : b.warps) {
                n += m.round*32 + m.n_here;
            }
            return n;
        };
        rounds = count();
        for (uint32_t k = 0; k < n_threads; k++) {
            thread & t = b.threads[backwards ? n_threads - 1 - k : k];
            if (t.done) {
                continue;
            }
            n_alive++;
            b.current = &t;
            swapcontext(&b.scheduler, &t.context);
            if (!b.error.empty()) {
                const std::string error = b.error;
                now = nullptr;
                throw std::runtime_error(error);
            }
            alive = alive || !t.done;
        }
        rounds_after = count();
        if (alive && rounds == rounds_after) {
            size_t n_left = 0;
            for (const thread & t : b.threads) {
                n_left += !t.done;
            }
            if (n_left == n_alive) {
                now = nullptr;
                throw std::runtime_error("threads wait for others that never come");
            }
        }
    }
    now = nullptr;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, uint32_t n_threads, size_t n_shared, Args... args) {
    grid_dim  = grid;
    block_dim = dim3(n_threads);
    for (uint32_t z = 0; z < grid.z; z++) {
        for (uint32_t y = 0; y < grid.y; y++) {
            for (uint32_t x = 0; x < grid.x; x++) {
                block_idx = dim3(x, y, z);
                run_block(n_threads, n_shared, [&]() { kernel(args...); });
            }
        }
    }
}

} // namespace simt

#define threadIdx (dim3(simt::now->current->id, 0, 0))
#define blockIdx  (simt::block_idx)
#define blockDim  (simt::block_dim)
#define gridDim   (simt::grid_dim)

// ---- threads -----------------------------------------------------------------------------------------------------------------------

ENTROPY_DEVICE int lane_id() { return (int) (simt::now->current->id % 32); }
ENTROPY_DEVICE int warp_id() { return (int) (simt::now->current->id / 32); }
ENTROPY_DEVICE int n_warps() { return (int) (simt::block_dim.x / 32); }

ENTROPY_DEVICE void warp_sync()  { simt::meet_warp("warp_sync", 0, nullptr); }
ENTROPY_DEVICE void block_sync() { simt::meet(simt::now->all, simt::now->current->id, "block_sync", 0, nullptr); }

ENTROPY_DEVICE void grid_wait()    { simt::now->current->waited = true; }
ENTROPY_DEVICE void grid_release() {}

ENTROPY_DEVICE uint32_t warp_ballot(bool vote) {
    return simt::meet_warp("warp_ballot", vote, [](const uint32_t * v, int n) {
        uint32_t mask = 0;
        for (int i = 0; i < n; i++) {
            mask |= v[i] << i;
        }
        return mask;
    });
}

ENTROPY_DEVICE bool warp_any(bool vote) {
    return simt::meet_warp("warp_any", vote, [](const uint32_t * v, int n) { return (uint32_t) (std::find(v, v + n, 1u) != v + n); }) != 0;
}

ENTROPY_DEVICE bool warp_all(bool vote) {
    return simt::meet_warp("warp_all", vote, [](const uint32_t * v, int n) { return (uint32_t) (std::find(v, v + n, 0u) == v + n); }) != 0;
}

ENTROPY_DEVICE int count_bits(uint32_t mask) { return __builtin_popcount(mask); }

ENTROPY_DEVICE uint32_t warp_min(uint32_t value) {
    return simt::meet_warp("warp_min", value, [](const uint32_t * v, int n) { return *std::min_element(v, v + n); });
}

ENTROPY_DEVICE uint32_t warp_max(uint32_t value) {
    return simt::meet_warp("warp_max", value, [](const uint32_t * v, int n) { return *std::max_element(v, v + n); });
}

// The value of another lane.
ENTROPY_DEVICE uint32_t warp_read(uint32_t value, int lane) {
    simt::meeting & m = simt::now->warps[simt::now->current->id / 32];
    simt::meet_warp("warp_read", value, nullptr);
    const uint32_t result = m.kept[lane];
    return result;
}

ENTROPY_DEVICE uint32_t keep(uint32_t value) { return value; }

ENTROPY_DEVICE int32_t warp_sum(int32_t value) {
    return (int32_t) simt::meet_warp("warp_sum", (uint32_t) value, [](const uint32_t * v, int n) {
        uint32_t sum = 0;
        for (int i = 0; i < n; i++) {
            sum += v[i];
        }
        return sum;
    });
}

// ---- memory ------------------------------------------------------------------------------------------------------------------------

template <typename T>
ENTROPY_DEVICE T shared_read(uint32_t at) {
    T value;
    std::memcpy(&value, simt::check_shared(at, sizeof(T), sizeof(T)), sizeof(T));
    return value;
}

template <typename T>
ENTROPY_DEVICE void shared_store(uint32_t at, T value) {
    std::memcpy(simt::check_shared(at, sizeof(T), sizeof(T)), &value, sizeof(T));
}

template <typename T>
ENTROPY_DEVICE T global_read(const T * from) {
    simt::check_global(from, sizeof(T), sizeof(T));
    return *from;
}

template <typename T>
ENTROPY_DEVICE T global_load(const T * from) {
    simt::check_global(from, sizeof(T), sizeof(T), true);
    return *from;
}

template <typename T>
ENTROPY_DEVICE void global_store(T * to, T value) {
    simt::check_global(to, sizeof(T), sizeof(T));
    *to = value;
}

ENTROPY_DEVICE uint32_t async_base() { return 0; }

template <int N>
ENTROPY_DEVICE void async_copy(uint32_t to, const void * from, bool wanted = true) {
    if (!wanted) {
        return;
    }
    simt::check_global(from, N, N);
    if (simt::early) {
        std::memcpy(simt::check_shared(to, N, N), from, N);
        return;
    }
    simt::now->current->open.push_back({ simt::check_shared(to, N, N), from, N });
}

ENTROPY_DEVICE void async_commit() {
    simt::thread & t = *simt::now->current;
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}

template <int N>
ENTROPY_DEVICE void async_wait() {
    simt::thread & t = *simt::now->current;
    while (t.groups.size() > N) {
        for (const simt::copy & c : t.groups.front()) {
            std::memcpy(c.to, c.from, c.n);
        }
        t.groups.erase(t.groups.begin());
    }
}

// ---- bits and numbers --------------------------------------------------------------------------------------------------------------

ENTROPY_DEVICE uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t shift) {
    shift &= 31;
    return shift != 0 ? high << shift | low >> (32 - shift) : high;
}

ENTROPY_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t) b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        result |= (uint32_t) (both >> 8*(selector >> 4*i & 7) & 255) << 8*i;
    }
    return result;
}

ENTROPY_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a*b + c; }

template <uint32_t B>
ENTROPY_DEVICE uint32_t high_byte_multiply_add(uint32_t a, uint32_t sum) {
    static_assert(B < 256, "a byte");
    return (a >> 24)*B + sum;
}

ENTROPY_DEVICE int32_t dot_u8_s8(uint32_t u, uint32_t s, int32_t sum) {
    for (int i = 0; i < 4; i++) {
        sum += (int32_t) (u >> 8*i & 255) * (int32_t) (int8_t) (s >> 8*i & 255);
    }
    return sum;
}

ENTROPY_DEVICE uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

ENTROPY_DEVICE float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

ENTROPY_DEVICE int32_t  round_to_int(float x)      { return (int32_t) std::lrint(x); }
ENTROPY_DEVICE float    half_to_float(uint16_t x)  { _Float16 h; std::memcpy(&h, &x, 2); return (float) h; }
ENTROPY_DEVICE uint16_t float_to_half(float x)     { const _Float16 h = (_Float16) x; uint16_t bits; std::memcpy(&bits, &h, 2); return bits; }
ENTROPY_DEVICE float    multiply(float a, float b) { return a*b; } // compiled with -ffp-contract=off
ENTROPY_DEVICE float    add(float a, float b)      { return a + b; }
