// SPDX-License-Identifier: MIT
//
// What the entropy kernels ask of the machine, each in one small function: warp and block operations, shared and global memory,
// asynchronous copies, bit tricks. Kernels are written in these words only, so they also compile as plain C++, where tests/cuda/simt.h of
// EntroLLM-GGUF runs every thread of a block in turn and checks every access: that is how they are tested without a GPU.
//
// Shared memory is addressed in bytes from the start of the block's dynamic shared memory; there is no other.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_fp16.h>

#define ENTROPY_DEVICE   static __device__ __forceinline__
#define ENTROPY_MEMBER   __device__ __forceinline__
#define ENTROPY_SLOW     static __device__ __noinline__
#define ENTROPY_UNROLL   _Pragma("unroll")
#define ENTROPY_NOUNROLL _Pragma("unroll 1")

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define ENTROPY_HAS_ASYNC_COPY 1
#endif

// ---- threads -----------------------------------------------------------------------------------------------------------------------

ENTROPY_DEVICE int  lane_id()    { return threadIdx.x % 32; }
// the same in all lanes, and the compiler is to know it
ENTROPY_DEVICE int  warp_id()    { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); }
ENTROPY_DEVICE int  n_warps()    { return blockDim.x / 32; }
ENTROPY_DEVICE void warp_sync()  { __syncwarp(); }
ENTROPY_DEVICE void block_sync() { __syncthreads(); }

// A kernel may be launched before the one ahead of it in its stream has ended (programmatic dependent launch, sm_90). It calls grid_wait
// before it touches what other kernels write or read, its results too: then all that is ahead has ended and is seen. grid_release lets the
// next kernel begin as soon as all blocks of this one have. Both do nothing in a kernel that was launched as usual.
ENTROPY_DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

ENTROPY_DEVICE void grid_release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

ENTROPY_DEVICE uint32_t warp_ballot(bool vote)      { return __ballot_sync(0xFFFFFFFF, vote); }
ENTROPY_DEVICE bool     warp_any(bool vote)         { return __any_sync(0xFFFFFFFF, vote); }
ENTROPY_DEVICE bool     warp_all(bool vote)         { return __all_sync(0xFFFFFFFF, vote); }
ENTROPY_DEVICE int      count_bits(uint32_t mask)   { return __popc(mask); }

ENTROPY_DEVICE uint32_t warp_min(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(0xFFFFFFFF, value);
#else
    for (int step = 16; step > 0; step /= 2) {
        value = min(value, __shfl_xor_sync(0xFFFFFFFF, value, step));
    }
    return value;
#endif
}

ENTROPY_DEVICE uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xFFFFFFFF, value);
#else
    for (int step = 16; step > 0; step /= 2) {
        value = max(value, __shfl_xor_sync(0xFFFFFFFF, value, step));
    }
    return value;
#endif
}

// The value of another lane.
ENTROPY_DEVICE uint32_t warp_read(uint32_t value, int lane) { return __shfl_sync(0xFFFFFFFF, value, lane); }

// The value as it is, in a register from now on: what follows from the thread's number alone the compiler would rather compute
// anew in every round of a loop.
ENTROPY_DEVICE uint32_t keep(uint32_t value) { return __shfl_sync(0xFFFFFFFF, value, threadIdx.x % 32); }

ENTROPY_DEVICE int32_t warp_sum(int32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xFFFFFFFF, value);
#else
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(0xFFFFFFFF, value, step);
    }
    return value;
#endif
}

// ---- memory ------------------------------------------------------------------------------------------------------------------------

extern __shared__ __align__(128) uint8_t entropy_shared[];

template <typename T>
ENTROPY_DEVICE void shared_store(uint32_t at, T value) {
    *(T *) (entropy_shared + at) = value;
}

template <typename T>
ENTROPY_DEVICE T shared_read(uint32_t at) {
    return *(const T *) (entropy_shared + at);
}

// Weights, which never change while a kernel runs.
template <typename T>
ENTROPY_DEVICE T global_load(const T * from) {
    return __ldg(from);
}

// What other kernels write: not before grid_wait, and so not by a load that may move to any place.
template <typename T>
ENTROPY_DEVICE T global_read(const T * from) {
    return *from;
}

template <typename T>
ENTROPY_DEVICE void global_store(T * to, T value) {
    *to = value;
}

// What async_copy calls byte 0.
ENTROPY_DEVICE uint32_t async_base() {
    return (uint32_t) __cvta_generic_to_shared(entropy_shared);
}

// Copy N bytes (4 or 16) to shared memory, to async_base() + offset, if wanted. They have landed after async_wait and a warp_sync.
template <int N>
ENTROPY_DEVICE void async_copy(uint32_t to, const void * from, bool wanted = true) {
#if defined(ENTROPY_HAS_ASYNC_COPY)
    // a predicate instead of a branch
    if constexpr (N == 16) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global.L2::256B [%0], [%1], 16; }"
            :: "r"(to), "l"(from), "r"((uint32_t) wanted) : "memory");
    } else {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], 4; }"
            :: "r"(to), "l"(from), "r"((uint32_t) wanted) : "memory");
    }
#else
    if (!wanted) {
        return;
    }
    if constexpr (N == 16) {
        shared_store<uint4>(to - async_base(), global_load((const uint4 *) from));
    } else {
        shared_store<uint32_t>(to - async_base(), global_load((const uint32_t *) from));
    }
#endif
}

// Copies so far are one group.
ENTROPY_DEVICE void async_commit() {
#if defined(ENTROPY_HAS_ASYNC_COPY)
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All groups but the last N have landed, as far as this thread's copies go.
template <int N>
ENTROPY_DEVICE void async_wait() {
#if defined(ENTROPY_HAS_ASYNC_COPY)
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

// ---- bits and numbers --------------------------------------------------------------------------------------------------------------

// The upper half of (high:low) << (shift mod 32).
ENTROPY_DEVICE uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t shift) {
    return __funnelshift_l(low, high, shift);
}

// Four bytes of (b:a), chosen by the nibbles of selector.
ENTROPY_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// a*b + c in one instruction: the compiler would rather shift first
ENTROPY_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// (a >> 24)*B + sum for a B below 256, in one instruction: the other three bytes are multiplied by zero
template <uint32_t B>
ENTROPY_DEVICE uint32_t high_byte_multiply_add(uint32_t a, uint32_t sum) {
    static_assert(B < 256, "a byte");
#if __CUDA_ARCH__ >= 610
    uint32_t result;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(B << 24), "r"(sum));
    return result;
#else
    return (a >> 24)*B + sum;
#endif
}

// sum + products of four unsigned and four signed bytes
ENTROPY_DEVICE int32_t dot_u8_s8(uint32_t u, uint32_t s, int32_t sum) {
#if __CUDA_ARCH__ >= 610
    int32_t result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(u), "r"(s), "r"(sum));
    return result;
#else
    ENTROPY_UNROLL
    for (int i = 0; i < 4; i++) {
        sum += (int32_t) (u >> 8*i & 255) * (int32_t) (int8_t) (s >> 8*i & 255);
    }
    return sum;
#endif
}

ENTROPY_DEVICE uint32_t float_bits(float x)      { return __float_as_uint(x); }
ENTROPY_DEVICE float    bits_float(uint32_t x)   { return __uint_as_float(x); }
ENTROPY_DEVICE int32_t  round_to_int(float x)    { return __float2int_rn(x); } // ties to even
ENTROPY_DEVICE float    half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
ENTROPY_DEVICE uint16_t float_to_half(float x)   { return __half_as_ushort(__float2half_rn(x)); }

// These two may not be contracted or approximated, whatever -use_fast_math says: decoded weights are bit-exact.
ENTROPY_DEVICE float multiply(float a, float b)  { return __fmul_rn(a, b); }
ENTROPY_DEVICE float add(float a, float b)       { return __fadd_rn(a, b); }

#else // plain C++

#include "simt.h"

#endif
