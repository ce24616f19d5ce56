// SPDX-License-Identifier: MIT
//
// Plugin of QEMU (API version 1: up to QEMU 8.2) that counts executed instructions and prints how many at exit, as
// bench/neon_instructions.py wants it. Distributions do not ship qemu-plugin.h with qemu-user, so the few functions that are used stand
// here.

#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_info_t;

extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb * tb);
extern void   qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*translated)(qemu_plugin_id_t id, struct qemu_plugin_tb * tb));
extern void   qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb * tb, int op, void * to, uint64_t n);
extern void   qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*at_exit)(qemu_plugin_id_t id, void * data), void * data);

enum { INLINE_ADD = 0 };

static uint64_t n_instructions;

// Blocks add their length whenever they run.
static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb * tb) {
    (void) id;
    qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD, &n_instructions, qemu_plugin_tb_n_insns(tb));
}

static void at_exit(qemu_plugin_id_t id, void * data) {
    (void) id;
    (void) data;
    fprintf(stderr, "instructions: %" PRIu64 "\n", n_instructions);
}

int qemu_plugin_version = 1;

int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t * info, int argc, char ** argv) {
    (void) info;
    (void) argc;
    (void) argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, at_exit, NULL);
    return 0;
}
