"""Perplexity of causal language models over sliding windows, clean and under word swaps, line by line."""
