"""Numbers of bytes as people read them."""

from __future__ import annotations


def in_units(size_bytes: float) -> str:
    """`282 GB`, `1.3 GB`, `270 MB`, `6 kB`, `12 bytes`."""
    if size_bytes >= 10_000_000_000:
        return f"{size_bytes / 1e9:,.0f} GB"
    if size_bytes >= 1_000_000_000:
        return f"{size_bytes / 1e9:.1f} GB"
    if size_bytes >= 1_000_000:
        return f"{size_bytes / 1e6:,.0f} MB"
    return f"{size_bytes / 1e3:,.0f} kB" if size_bytes >= 1000 else f"{size_bytes:.0f} bytes"
