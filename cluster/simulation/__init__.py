"""A cluster under a virtual clock: heat, cards, requests, and the policies that serve it."""
