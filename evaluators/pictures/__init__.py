"""What was measured as pictures: SVG text, no browser, no drawing library."""
