"""Super-resolution of pictures at the command line."""
