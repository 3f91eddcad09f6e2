"""One module for each algorithm, and what they have in common."""
