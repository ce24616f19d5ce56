#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""`python convert.py HF_DIR OUT.gguf`: the same as `entrollm convert`. See `--help`."""

import sys

from entrollm_gguf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
