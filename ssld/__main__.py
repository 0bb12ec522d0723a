"""`python -m ssld` is the command `ssld`."""

from ssld.cli import main

main()
