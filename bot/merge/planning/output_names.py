"""Names of the files that every output holds beside the weights."""

from __future__ import annotations

MANIFEST = "manifest.json"  # every file by size and hash; the last one written, so a folder that has it is whole
PROVENANCE = "merge_provenance.json"  # what the merge was made of
SCHEMA = "mergebot.merge_provenance/1"
MANIFEST_SCHEMA = "mergebot.manifest/1"
