"""`python -m pykernels`: the command line."""

from .cli import main

main()
