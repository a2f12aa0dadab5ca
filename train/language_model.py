"""The same as ``symphony-vlm train``, for recipes of text stages: ``python -m train.language_model --config NAME``."""

import sys

from symphony_vlm.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
