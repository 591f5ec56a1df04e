"""Forecasting of gridded fields: the network, fields from files, training, rollouts and scores."""
