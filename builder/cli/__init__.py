"""The command line: `main` is what `builder` runs."""

from builder.cli.app import main

__all__ = ["main"]
