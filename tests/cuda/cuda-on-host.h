// SPDX-License-Identifier: MIT
//
// The few functions of the CUDA runtime that bench/gpu/harness.cu calls, over simt.h: so the program that checks the kernels on a GPU is
// itself checked on the CPU. Device memory is host memory that kernels may touch; launches are done when they return.

#pragma once

#include "simt.h"

typedef int cudaError_t;
typedef int cudaEvent_t;

static constexpr cudaError_t cudaSuccess = 0;

enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

struct cudaDeviceProp {
    char   name[16];
    int    major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin;
};

static inline const char * cudaGetErrorString(cudaError_t) { return "error"; }

static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp * device, int) {
    *device = { "simt.h", 9, 0, 1, 227*1024 };
    return cudaSuccess;
}

template <typename T>
static cudaError_t cudaMalloc(T ** data, size_t n) {
    *data = (T *) std::aligned_alloc(256, (n + 255)/256*256);
    simt::memory[(uintptr_t) *data] = n;
    return cudaSuccess;
}

static inline cudaError_t cudaFree(void * data) {
    simt::memory.erase((uintptr_t) data);
    std::free(data);
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpy(void * to, const void * from, size_t n, int) {
    std::memcpy(to, from, n);
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t n, int kind) {
    return cudaMemcpy(to, from, n, kind);
}

static inline cudaError_t cudaMemset(void * to, int value, size_t n) {
    std::memset(to, value, n);
    return cudaSuccess;
}

static inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// Nothing is timed here: harness table is for a GPU.
static inline cudaError_t cudaEventCreate(cudaEvent_t *)      { return cudaSuccess; }
static inline cudaError_t cudaEventRecord(cudaEvent_t)        { return cudaSuccess; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t)   { return cudaSuccess; }
static inline cudaError_t cudaEventDestroy(cudaEvent_t)       { return cudaSuccess; }
static inline cudaError_t cudaEventElapsedTime(float * ms, cudaEvent_t, cudaEvent_t) { *ms = 1.0f; return cudaSuccess; }
