"""The backbones, one file a system."""
