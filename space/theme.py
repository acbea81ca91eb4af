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
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        block_shadow="none",
        input_border_width="1px",
        button_border_width="1px",
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_600",
        button_primary_border_color="*primary_600",
        button_primary_border_color_dark="*primary_600",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_text_color="*neutral_900",
        button_secondary_text_color_dark="*neutral_100",
        button_cancel_background_fill="white",
        button_cancel_background_fill_dark="*neutral_900",
        button_cancel_background_fill_hover="#fdf1ee",
        button_cancel_background_fill_hover_dark="#2c1815",
        button_cancel_border_color="#d99a8e",
        button_cancel_border_color_dark="#7a3226",
        button_cancel_text_color="#a83322",
        button_cancel_text_color_dark="#f5a193",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_300",
        link_text_color_hover="*primary_700",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited="*primary_600",
        link_text_color_visited_dark="*primary_300",
        checkbox_label_background_fill="white",
        checkbox_label_background_fill_dark="*neutral_900",
        table_even_background_fill="white",
        table_even_background_fill_dark="*neutral_900",
        table_odd_background_fill="*neutral_50",
        table_odd_background_fill_dark="*neutral_900",
        table_row_focus="*primary_50",
        table_row_focus_dark="*primary_950",
        table_text_color="*neutral_900",
        table_text_color_dark="*neutral_100",
    )
