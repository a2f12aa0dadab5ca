"""What a model's routers decide about clean and corrupted prompts, how far apart it is; see docs/routing-drift.md."""
