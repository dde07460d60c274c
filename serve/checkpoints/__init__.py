"""What model files are, read from their headers alone: no torch, no weights, seconds for 30 GB."""
