"""One script per benchmark, and what they share."""
