"""The same as ``symphony-vlm perplexity``: ``python -m eval.perplexity --model DIR --text FILE``."""

import sys

from symphony_vlm.cli import main

if __name__ == "__main__":
    main(["perplexity", *sys.argv[1:]])
