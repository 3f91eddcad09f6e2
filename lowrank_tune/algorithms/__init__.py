"""One file an algorithm, and the kit that an algorithm may touch."""
