"""A controlled test of whether fine-tuning sheds a planted bias. Finished: docs/results/inheritance.md is its page."""
