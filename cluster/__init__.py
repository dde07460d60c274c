"""Where Kelvin runs and how much of it: pure policies, and what joins them to cards and Ray."""
