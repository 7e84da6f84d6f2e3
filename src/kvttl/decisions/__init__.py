"""Decision records: what they hold, their log, metrics and notices."""
