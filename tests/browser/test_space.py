"""What a person sees and does in the Space."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from bot.jobs.job import Failure, Stage
from space.desk import now
from tests.browser.conftest import OpenPage
from tests.space import exhibits
from tests.space.conftest import Stage as Space

pytestmark = pytest.mark.slow
WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)
HOSTILE = (
    "<img src=x onerror=\"window.pwned='img'\">",
    "<script>window.pwned='script'</script>",
    "${window.pwned='template'}",
    "{{constructor.constructor(\"window.pwned='handlebars'\")()}}",
    '"><svg onload="window.pwned=\'svg\'">',
    "[x](javascript:window.pwned='link')",
    "\u202egnp.exe\u200b\x1b[31m",
)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def write_recipe(page: Page, text: str) -> None:
    page.locator("#recipe .cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(text)


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label).click()
    page.get_by_role("option", name=option, exact=True).click()


def column(page: Page, place: int) -> list[str]:
    """A column of the leaderboard, from top to bottom as it is seen."""
    cells = page.locator(f"#board [role=gridcell][data-col='{place}']")
    found = [(int(cell.get_attribute("aria-rowindex") or 0), cell.inner_text().strip()) for cell in cells.all()]
    return [text for _, text in sorted(found)]


def expect_column(page: Page, place: int, starts_with: list[str]) -> None:
    """Wait until the column begins like this."""
    page.wait_for_function(
        """([place, wanted]) => {
            const cells = [...document.querySelectorAll(`#board [role=gridcell][data-col='${place}']`)];
            cells.sort((a, b) => a.getAttribute('aria-rowindex') - b.getAttribute('aria-rowindex'));
            return wanted.every((text, row) => cells[row] && cells[row].innerText.trim() === text);
        }""",
        arg=[place, starts_with],
        timeout=WAIT_MS,
    )


def test_every_tab_shows_its_content(space: Space, open_page: OpenPage) -> None:
    page = open_page(space.url)
    expect(page.locator("#recipe")).to_contain_text("merge_method: task_arithmetic")
    expect(page.get_by_label("Start from an example")).to_have_value("Keep both skills")
    tab(page, "Jobs")
    expect(page.locator("#jobs")).to_contain_text("weighted-early-layers")
    expect(page.locator("#jobs progress").first).to_be_visible()
    tab(page, "Leaderboard")
    expect(page.locator("#board")).to_contain_text("70.5 (63.5–76.5)")
    expect(page.locator("#quality-speed svg")).to_be_visible()
    expect(page.locator("#parents svg")).to_be_visible()


def test_an_empty_page_shows_the_next_step(empty_space: Space, open_page: OpenPage) -> None:
    page = open_page(empty_space.url)
    tab(page, "Jobs")
    expect(page.locator("#jobs")).to_contain_text("No jobs yet. Submit one in the first tab.")
    tab(page, "Leaderboard")
    expect(page.locator("#board-empty")).to_contain_text("No merges yet. Submit one in the first tab.")
    expect(page.locator("#board")).to_be_hidden()


def test_a_wrong_recipe_is_answered_with_its_line_and_the_next_step(space: Space, open_page: OpenPage) -> None:
    page = open_page(space.url)
    write_recipe(page, "merge_method: linaer\nmodels: []\n")
    page.get_by_label("Name of the merged model").fill("wrong")
    page.get_by_role("button", name="Submit").click()
    notice = page.locator("#answer [role=alert]")
    expect(notice).to_contain_text("`linaer` is not known")
    expect(notice).to_contain_text("Line 1")
    expect(notice).to_contain_text("Did you mean `linear`?")
    expect(page.get_by_role("button", name="Follow this job")).to_be_hidden()


def test_a_check_shows_the_plan_and_the_pinned_sources(space: Space, open_page: OpenPage) -> None:
    page = open_page(space.url)
    page.get_by_role("button", name="Check").click()
    answer = page.locator("#answer")
    expect(answer).to_contain_text("Nothing has been queued yet")
    for source in (exhibits.BASE, exhibits.POET, exhibits.SMITH):
        link = answer.get_by_role("link", name=source)
        assert (link.get_attribute("href") or "").startswith(f"{space.hub.url}/{source}/tree/")
    expect(answer.locator("code.sha")).to_have_count(3)


def test_a_submitted_merge_can_be_followed_and_cancelled(space: Space, open_page: OpenPage) -> None:
    page = open_page(space.url)
    page.get_by_label("Name of the merged model").fill("followed")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#answer")).to_contain_text("Accepted.")
    page.get_by_role("button", name="Follow this job").click()
    expect(page.locator("#job h2")).to_have_text("followed")
    page.get_by_role("button", name="Cancel this job").click()
    page.get_by_role("button", name="Yes, stop it").click()
    expect(page.locator("#job")).to_contain_text("Cancelled by its owner. Nothing was published.")
    expect(page.get_by_role("button", name="Cancel this job")).to_be_hidden()
    job = next(each for each in space.queue.jobs() if each.request.name == "followed")
    assert job.cancelled_at is not None


def test_a_job_of_somebody_else_has_no_cancel_button(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?job={space.jobs['merging']}")
    expect(page.locator("#job h2")).to_have_text("between")
    expect(page.get_by_role("button", name="Cancel this job")).to_be_hidden()


def test_a_failed_job_says_why_and_a_published_one_where(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?job={space.jobs['failed']}")
    expect(page.locator("#job [role=alert]")).to_contain_text("has 12 NaN values in smol/smiths-135m")
    row = page.locator(f"#jobs button[data-job='{space.jobs['published']}']")
    row.focus()
    page.keyboard.press("Enter")
    link = page.locator("#job .notice a")
    expect(link).to_have_text("mergebot/alice-both-skills")
    assert (link.get_attribute("href") or "").startswith(f"{space.hub.url}/mergebot/alice-both-skills")


def test_a_job_page_moves_on_by_itself(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?job={space.jobs['again']}")
    expect(page.locator("#job")).to_contain_text("nothing is lost")
    space.queue.cancel(space.jobs["again"], "alice")
    expect(page.locator("#job")).to_contain_text("Cancelled by its owner.")


def test_the_leaderboard_sorts_by_figures_and_shows_them_whole(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?tab=leaderboard")
    expect(page.locator("#board")).to_contain_text("alice-both-skills")
    by_average = sorted(
        exhibits.board_rows(space.hub.url), key=lambda row: (row.average is not None, row.average or 0), reverse=True
    )
    assert column(page, 0) == [row.model.rpartition("/")[2] for row in by_average]
    choose(page, "Sort by", "speedup")
    expect_column(page, 7, ["2.06× (1.98–2.14)", "1.83× (1.75–1.92)", "1.71× (1.60–1.83)"])
    assert column(page, 7)[-1] == "–"
    choose(page, "Sort by", "invented_smiths")
    expect_column(page, 0, ["carol-ties-density-05", "alice-both-skills"])
    # The column's own menu sorts in the browser: by the figure, not by its text; what is chosen then is that row.
    header = page.locator("#board [data-testid='header-7']")
    header.hover()
    header.get_by_label("Open cell menu").click()
    page.get_by_role("menuitem", name="Sort ascending").click()
    expect_column(page, 7, ["–", "0.94× (0.90–0.99)", "1.02× (0.96–1.09)"])
    expect_column(page, 0, ["carol-ties-density-02", "alice-average", "bob-between"])
    page.locator("#board [role=gridcell]", has_text="0.94×").click()
    expect(page.get_by_label("Merge to show")).to_have_value("alice-average")
    expect(page.locator("#detail")).to_contain_text("0.90 to 0.99: slower")


def test_a_board_of_two_tasks_is_as_wide_as_a_desks_page(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?tab=leaderboard")
    last = page.locator("#board [role=gridcell][data-col='8']").first
    expect(last).to_have_text("134.5 M")
    cell, board = last.bounding_box(), page.locator("#board").bounding_box()
    assert cell is not None and board is not None
    assert cell["x"] + cell["width"] <= board["x"] + board["width"] + 1


def test_the_leaderboard_filters_by_word_source_and_average(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?tab=leaderboard")
    expect(page.locator("#board-summary")).to_contain_text("8 published merges")
    page.get_by_label("Search").fill("ties carol")
    expect(page.locator("#board-summary")).to_contain_text("2 of 8 published merges")
    expect_column(page, 0, ["carol-ties-density-05", "carol-ties-density-02"])
    page.get_by_label("Minimum average, %").fill("65")
    expect(page.locator("#board-summary")).to_contain_text("1 of 8 published merges")
    page.get_by_label("Minimum average, %").fill("0")
    page.get_by_label("Search").fill("")
    choose(page, "Source models", exhibits.BASE)
    expect(page.locator("#board-summary")).to_contain_text("4 of 8 published merges")
    choose(page, "Method", "ties")
    expect(page.locator("#board-summary")).to_contain_text("2 of 8 published merges")
    page.get_by_label("Search").fill("nobody made this")
    expect(page.locator("#board-empty")).to_contain_text("No merge matches these filters. Remove some of them.")


def test_a_chosen_row_is_shown_beside_its_parents(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?tab=leaderboard")
    page.locator("#board [role=gridcell]", has_text="slerp").first.click()
    expect(page.get_by_label("Merge to show")).to_have_value("bob-between")
    expect(page.locator("#detail")).to_contain_text("0.96 to 1.09: not clearly different")
    expect(page.locator("#parents")).to_contain_text(exhibits.POET)
    choose(page, "Merge to show", "carol-ties-density-05")
    expect(page.locator("#detail")).to_contain_text("mergebot/carol-ties-density-05")


@pytest.mark.parametrize("name", ["Submit", "Jobs", "Leaderboard"])
def test_a_telephone_is_wide_enough(space: Space, open_page: OpenPage, name: str) -> None:
    page = open_page(f"{space.url}/?tab={name.lower()}", width=390, height=844)
    expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
    expect(page.locator("#board-summary" if name == "Leaderboard" else "#tabs")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_on_a_telephone_the_pictures_of_a_job_can_be_seen_to_their_end(space: Space, open_page: OpenPage) -> None:
    page = open_page(f"{space.url}/?job={space.jobs['published']}", width=390, height=844)
    expect(page.locator("#job .picture")).to_have_count(2)
    for place in page.locator("#job .picture").all():
        place.evaluate("picture => { picture.parentElement.scrollLeft = picture.scrollWidth }")
        box = place.bounding_box()
        assert box is not None and box["x"] < 0 and box["x"] + box["width"] <= 390
    assert page.locator("#jobs").evaluate("list => list.clientHeight") <= 844 / 2


def test_untrusted_text_stays_text(space: Space, open_page: OpenPage) -> None:
    for place, text in enumerate(HOSTILE):
        job = exhibits.submit(space.queue, f"eve{place}", text, now())
        lease = next(lease for lease in iter(lambda: space.queue.claim("eve"), None) if lease.job_id == job)
        space.queue.record(lease, Failure(Stage.MERGING, "NOT_FINITE", text, text))
    page = open_page(f"{space.url}/?tab=jobs")
    for text in HOSTILE[:-1]:
        page.locator("#jobs button").filter(has_text=text).click()
        expect(page.locator("#job h2")).to_have_text(text)
    shown = page.locator("#jobs").inner_text()
    assert "gnp.exe[31m" in shown and "\u202e" not in shown and "\x1b" not in shown
    tab(page, "Submit")
    write_recipe(page, "merge_method: " + HOSTILE[0] + "\n")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#answer [role=alert]")).to_be_visible()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#jobs img, #jobs script, #jobs svg, #job img, #job script, #answer img").count() == 0


def test_a_question_left_open_is_not_asked_of_another_job(space: Space, open_page: OpenPage) -> None:
    first, second = (exhibits.submit(space.queue, "visitor", name, now()) for name in ("first", "second"))
    page = open_page(f"{space.url}/?job={first}")
    page.get_by_role("button", name="Cancel this job").click()
    expect(page.get_by_role("button", name="Yes, stop it")).to_be_visible()
    page.locator(f"#jobs button[data-job='{second}']").click()
    expect(page.locator("#job h2")).to_have_text("second")
    expect(page.get_by_role("button", name="Yes, stop it")).to_be_hidden()
    expect(page.get_by_role("button", name="Cancel this job")).to_be_visible()
