"""Vision tower, projector, merge and language model: the vision-language model and its processor."""
