"""From tiles on disk to batches of views."""
