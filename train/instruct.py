"""The same as ``symphony-vlm train``; under a launcher: ``torchrun --nproc-per-node N -m train.instruct ...``."""

import sys

from symphony_vlm.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
