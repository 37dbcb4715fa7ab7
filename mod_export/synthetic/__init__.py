"""Models of any shape with random weights, to measure speed."""
