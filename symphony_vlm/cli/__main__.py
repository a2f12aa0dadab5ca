"""``python -m symphony_vlm.cli``."""

from symphony_vlm.cli import main

main()
