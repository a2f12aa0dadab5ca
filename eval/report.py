"""The same as ``symphony-vlm report``: ``python -m eval.report OUT_A OUT_B --output PAGE``."""

import sys

from symphony_vlm.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
