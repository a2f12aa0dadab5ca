"""Tasks, corruptions, the evaluation runner, statistics and reports."""
