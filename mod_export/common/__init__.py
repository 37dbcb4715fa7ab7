"""What every part of the package uses and what knows nothing of models: files, tables, progress."""
