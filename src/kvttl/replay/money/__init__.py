"""What KV cache costs and saves: tariffs, bills of replays, how long prompts are worth keeping."""
