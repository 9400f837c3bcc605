"""A controlled test of whether fine-tuning sheds a planted bias. Not run yet: see run.py."""
