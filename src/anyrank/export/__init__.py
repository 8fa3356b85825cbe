"""Exports: results that run without anyrank."""
