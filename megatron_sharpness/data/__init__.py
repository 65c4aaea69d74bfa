"""Text as tokens: written, cut into windows, and drawn for evaluation."""
