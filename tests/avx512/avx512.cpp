// SPDX-License-Identifier: MIT
//
// Kernel level avx512 against ref. The kernel's own source is compiled, on processors without AVX-512 over SIMDe's emulation (EMULATED).

#include <immintrin.h>

#ifdef EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// SIMDe 0.7.4 gives it the arguments of its masked sister
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
// and lacks this one
static simde__m512 to_floats(simde__m512i v) {
    simde__m512_private  to;
    simde__m512i_private from = simde__m512i_to_private(v);
    for (int i = 0; i < 16; i++) {
        to.f32[i] = (float) from.i32[i];
    }
    return simde__m512_from_private(to);
}
#define _mm512_cvtepi32_ps(a) to_floats(a)
#define TARGET_OF(sets)
#endif

#include "ggml-cpu/entropy/entropy-kernel-avx512.cpp"
#include "kernel-checks.h"

int main() {
    kernel_checks checks;
    checks.codes(decode_units<vectors>);
    checks.products(vnni::multiply, "products with VNNI: columns");
    checks.products(plain::multiply, "products without VNNI: columns");
    return checks.finish();
}
