"""Theme of the page: system fonts, one accent colour, light and dark mode."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from space.markup import Markup

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Cascadia Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

LOGO_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="26" height="26" role="img" aria-label="">'
    '<path d="M4 7c9 0 8 9 15 9h9M4 25c9 0 8-9 15-9" fill="none" stroke="#1c9785" stroke-width="4" '
    'stroke-linecap="round"/></svg>'
)
LOGO = Markup(LOGO_SVG)

CSS = Path(__file__).with_name("style.css").read_text(encoding="utf-8")

_ACCENT = gr.themes.Color(
    name="verdigris",
    c50="#eefaf7",
    c100="#d5f2ec",
    c200="#abe4d9",
    c300="#75cfc0",
    c400="#3fb3a2",
    c500="#1c9785",
    c600="#0d7a6b",
    c700="#0c6257",
    c800="#0d4e47",
    c900="#0d403b",
    c950="#052522",
)
_PAPER = gr.themes.Color(
    name="paper",
    c50="#faf9f7",
    c100="#f3f1ed",
    c200="#e6e3dc",
    c300="#d2cec4",
    c400="#a19d94",
    c500="#726f68",
    c600="#55534d",
    c700="#3d3c39",
    c800="#272725",
    c900="#1b1c1b",
    c950="#131413",
)

# Variable of Gradio's theme -> its colour in light and in dark mode.
_COLOURS = {
    "body_background_fill": ("*neutral_50", "*neutral_950"),
    "body_text_color": ("*neutral_900", "*neutral_100"),
    "body_text_color_subdued": ("*neutral_500", "*neutral_400"),
    "background_fill_primary": ("white", "*neutral_900"),
    "background_fill_secondary": ("*neutral_100", "*neutral_800"),
    "block_background_fill": ("white", "*neutral_900"),
    "block_border_color": ("*neutral_200", "*neutral_800"),
    "border_color_primary": ("*neutral_200", "*neutral_700"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_label_text_color": ("*neutral_600", "*neutral_300"),
    "block_title_text_color": ("*neutral_700", "*neutral_200"),
    "block_info_text_color": ("*neutral_500", "*neutral_400"),
    "checkbox_border_color": ("*neutral_400", "*neutral_600"),
    "button_primary_border_color": ("*primary_600", "*primary_600"),
    "button_secondary_background_fill_hover": ("*neutral_100", "*neutral_700"),
    "button_secondary_text_color": ("*neutral_900", "*neutral_100"),
    "button_cancel_background_fill": ("white", "*neutral_900"),
    "button_cancel_background_fill_hover": ("#fdf1ee", "#2c1815"),
    "button_cancel_border_color": ("#d99a8e", "#7a3226"),
    "button_cancel_text_color": ("#a83322", "#f5a193"),
    "input_background_fill": ("white", "*neutral_950"),
    "input_border_color": ("*neutral_300", "*neutral_700"),
    "input_border_color_focus": ("*primary_500", "*primary_400"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),
    "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
    "button_secondary_background_fill": ("white", "*neutral_800"),
    "button_secondary_border_color": ("*neutral_300", "*neutral_600"),
    "link_text_color": ("*primary_600", "*primary_300"),
    "link_text_color_hover": ("*primary_700", "*primary_200"),
    "link_text_color_visited": ("*primary_600", "*primary_300"),
    "checkbox_label_background_fill": ("white", "*neutral_900"),
    "table_even_background_fill": ("white", "*neutral_900"),
    "table_odd_background_fill": ("*neutral_50", "*neutral_900"),
    "table_row_focus": ("*primary_50", "*primary_950"),
    "table_text_color": ("*neutral_900", "*neutral_100"),
}


def theme() -> gr.themes.Base:
    """Gradio theme with font names only: nothing is downloaded."""
    return gr.themes.Base(
        primary_hue=_ACCENT,
        secondary_hue=_ACCENT,
        neutral_hue=_PAPER,
        radius_size=gr.themes.sizes.radius_sm,
        text_size=gr.themes.sizes.text_md,
        font=[*SANS],
        font_mono=[*MONO],
    ).set(
        block_border_width="1px",
        block_label_border_width="0px",
        block_title_text_weight="600",
        block_shadow="none",
        input_border_width="1px",
        button_border_width="1px",
        checkbox_border_width="1px",
        button_primary_text_color="white",
        **{name: light for name, (light, _) in _COLOURS.items()},
        **{f"{name}_dark": dark for name, (_, dark) in _COLOURS.items()},
    )
