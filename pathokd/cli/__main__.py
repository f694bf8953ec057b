"""`python -m pathokd.cli`, for where the console script is not on the path."""

from pathokd.cli.main import entry

entry()
