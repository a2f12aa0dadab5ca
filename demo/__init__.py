"""The chat page as a Hugging Face Space."""
