"""What in docs/ is generated from the code."""
