"""What a model's routers decide about clean and corrupted prompts, and how far the two lie apart (docs/routing-drift.md)."""
