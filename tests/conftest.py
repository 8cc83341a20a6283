"""Fixtures of the whole suite; each lives in `support`."""

pytest_plugins = ["support.servers", "support.models", "support.leaks"]
