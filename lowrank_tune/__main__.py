"""`python -m lowrank_tune` is the command line."""

from lowrank_tune.cli import main

main()
