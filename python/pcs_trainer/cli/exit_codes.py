"""What the exit code of `pcs` says; docs/command-line.md has the same table."""

DONE, FAILED, WRONG_USAGE, DOES_NOT_FIT = 0, 1, 2, 3
INTERRUPTED = 130  # as shells report SIGINT: 128 + 2
