"""Measurements as pictures: SVG text, without a drawing library."""
