"""Reading pictures and collections of them."""
