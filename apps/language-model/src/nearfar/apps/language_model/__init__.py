"""Train, evaluate and audit causal language models with exchangeable sequence mixers."""
