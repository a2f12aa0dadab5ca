"""The same as ``symphony-vlm eval``: ``python -m eval.benchmark --model DIR --task scenes --output OUT``."""

import sys

from symphony_vlm.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
