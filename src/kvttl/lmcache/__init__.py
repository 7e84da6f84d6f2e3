"""What LMCache is and says: tiers, HTTP, directory, a model of its rules."""
