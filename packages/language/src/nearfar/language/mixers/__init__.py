"""The mixers that configs name, one file a system."""
