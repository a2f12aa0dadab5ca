"""Training entry points: ``python -m train.pretrain``, ``train.instruct``, ``train.language_model``."""
