"""Stores: where a bot's records are kept."""
