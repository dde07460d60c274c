"""The built-in model: SD3.5 in small, and the drawn world that it was trained on."""
