"""The common parts of all scripts that are not the method, one file for each. Nothing here imports a script."""
