"""The segmentation networks, one file a system."""
