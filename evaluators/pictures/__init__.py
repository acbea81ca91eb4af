"""Figures of scores and speed as SVG text, drawn without a library or a browser."""
