"""What every nearfar package needs around a model: checkpoints, contracts, training, command line, pictures."""
