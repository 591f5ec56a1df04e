"""Training and using picture classifiers."""
