"""Reading scans and collections of them."""
