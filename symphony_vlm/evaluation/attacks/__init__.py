"""Attacks: what a model answers when somebody works against it, with a stated budget (``docs/attacks.md``)."""
