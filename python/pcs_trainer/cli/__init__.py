"""The pcs command. Importing this package imports no torch."""
