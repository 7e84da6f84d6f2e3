"""What KV cache costs and saves: tariffs, bills of replays, and how long a prompt is worth keeping."""
