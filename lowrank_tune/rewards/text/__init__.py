"""Rewards on the text of a completion: format, regular expression, JSON schema, length, repetition."""
