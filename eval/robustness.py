"""``symphony-vlm eval`` on the common corruptions: ``python -m eval.robustness --model DIR --output OUT ...``."""

import sys

from symphony_vlm.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    main(["eval", *([] if "--corruption" in given else ["--corruption", "common"]), *given])
