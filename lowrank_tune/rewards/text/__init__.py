"""Rewards on the text of a completion: `json_schema`, `format` and `regex`, `length`, `repetition`."""
