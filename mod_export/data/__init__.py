"""Text to tokens, for calibration, training and evaluation."""
