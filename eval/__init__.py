"""One script per benchmark, and the code that they share."""
