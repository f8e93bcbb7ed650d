"""Run the command line: ``python -m bigincubate``."""

from .cli import main

main()
