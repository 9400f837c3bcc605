"""What every script shares and no paper mentions, a file for each concern. Nothing here imports a script."""
