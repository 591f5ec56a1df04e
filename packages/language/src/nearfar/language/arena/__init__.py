"""Long Range Arena (Tay et al. 2020, arXiv 2011.04006): ListOps, readers of the other tasks, training."""
