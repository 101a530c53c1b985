"""Run the operator's commands with `python -m tieredlimit`."""

from tieredlimit.cli import main

main()
