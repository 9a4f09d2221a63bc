"""The built-in methods: one function of `g2tm` and one registry entry each."""

from patch.methods import adaptive, counted, trained  # noqa: F401 - fills the registry
