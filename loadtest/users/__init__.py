"""Locust users, one kind a door. Importing them imports locust, which patches the process."""
