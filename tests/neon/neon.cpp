// SPDX-License-Identifier: MIT
//
// Kernel level neon against ref; the kernel's own source is compiled.

#include "ggml-cpu/entropy/entropy-kernel-neon.cpp"
#include "kernel-checks.h"

int main() {
    ggml_entropy_kernel kernel;
    if (!ggml_entropy_kernel_neon(&kernel)) {
        printf("compiled for a processor without dot products\n");
        return 1;
    }
    kernel_checks checks;
    checks.codes(kernel.decode);
    checks.products(kernel.multiply, "products: columns");
    return checks.finish();
}
