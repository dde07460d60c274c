"""Load tests, benchmarks against peers, and measurements of what pictures show."""
