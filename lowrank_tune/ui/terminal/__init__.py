"""The terminal dashboard, the chat screen and the plain log."""
