"""Shared material of the tests: dense matrices, stock modules, probing optimizers."""
