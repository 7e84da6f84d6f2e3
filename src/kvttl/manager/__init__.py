"""The manager's parts: metadata, claims, placement, recovery."""
