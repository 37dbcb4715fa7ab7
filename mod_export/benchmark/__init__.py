"""Speed and memory against the dense model."""
