"""`nearfar image-classification`: train, evaluate, use and compare picture classifiers."""
