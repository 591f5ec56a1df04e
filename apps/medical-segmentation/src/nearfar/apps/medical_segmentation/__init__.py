"""`nearfar medical-segmentation`: segment volumes and pictures, and score what was segmented."""
