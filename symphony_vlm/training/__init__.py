"""Runs recipes: stages one after the other, each with Hugging Face's Trainer, restartable at every point."""
