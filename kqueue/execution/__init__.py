"""Execution: how a job runs. A strategy takes Work and returns an Outcome; it never touches a queue."""
