"""`python -m kexue` is the command line."""

from kexue.lab.cli import main

main()
