"""Runs many ranks on one machine: threads of this process that take turns, threads that run freely, or processes of their own."""
