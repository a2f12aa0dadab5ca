"""Model cards: the README.md of a saved model, as the Hugging Face hub shows it."""
