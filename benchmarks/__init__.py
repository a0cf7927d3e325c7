"""Measurements of the clip beside its peers; each module is a command."""
