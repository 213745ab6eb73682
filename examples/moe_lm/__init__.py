"""The parts of `train_moe_lm.py`: text, model, training step, picture."""
