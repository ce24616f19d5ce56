// SPDX-License-Identifier: MIT
//
// Kernel level neon against ref; the kernel's own source is compiled.

#include "ggml-cpu/entropy/entropy-kernel-neon.cpp"
#include "kernel-checks.h"

int main() {
    ggml_entropy_kernel kernel;
    ggml_entropy_kernel_neon(&kernel);
    kernel_checks checks;
    checks.codes(kernel.decode);
    checks.products(kernel.multiply, "products: columns");
    return checks.finish();
}
