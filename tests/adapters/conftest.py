"""The worker is a program of its own, started by the tests."""

collect_ignore = ["worker.py"]
