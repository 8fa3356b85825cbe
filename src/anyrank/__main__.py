"""`python -m anyrank` is the `anyrank` command."""

from .cli import main

main()
