"""What other policies would have hit on the live traffic: shadow caches of metadata."""
