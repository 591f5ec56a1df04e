"""Speaker verification from the command line."""
