"""Tables that commands print once."""
