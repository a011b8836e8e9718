"""The page: one file that holds everything, says the same in its table as in its bars, and escapes what a file says."""

from __future__ import annotations

from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.chart import lay_out
from asyncvmm.timing.compare import compare, group
from asyncvmm.timing.markup import Markup, element
from asyncvmm.timing.page import MAX_BOOTS, page
from asyncvmm.timing.page_chart import TICKS, ticks
from asyncvmm.timing.reading import read_recordings
from tests.support.recordings import MS, boot, line, phase, restore

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\x1b[2J\u202e"


def paint(*files: list[bytes]) -> str:
    charts = [[lay_out(one) for one in read_recordings(lines, "f.jsonl").recordings] for lines in files]
    comparison = compare([group(f"f{number}", some) for number, some in enumerate(charts)])
    return page([chart for some in charts for chart in some], comparison)


class Seen(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_it_asks_nobody_for_anything() -> None:
    seen = Seen(paint(boot()))
    assert {value for name, value in seen.attributes if name in ("src", "href", "action", "srcset")} == {"data:,"}
    assert seen.tags.count("script") == 1
    assert "@import" not in paint(boot())
    assert "url(" not in paint(boot())


def test_its_policy_lets_in_nothing_but_its_own_style_and_script() -> None:
    (policy,) = [value for name, value in Seen(paint(boot())).attributes if value and "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not [name for name, _ in Seen(paint(boot())).attributes if name == "style" or name.startswith("on")]


def test_the_table_beneath_has_every_row_with_its_figures() -> None:
    cells = Seen(paint(boot())).cells
    at = cells.index("boot_wait")
    assert cells[at : at + 4] == ["boot_wait", "16.0 ms", "80.0 ms", "80.8%"]
    for label in ("total", "residual of boot", "init_entry", "command_loop", "READY"):
        assert label in cells


def test_what_a_file_says_is_text_wherever_it_stands() -> None:
    lines = [
        phase(HOSTILE, 0, MS, vm=HOSTILE),
        phase("total", 0, 2 * MS, vm=HOSTILE, failed=True),
        line("guest.boot_time", MS, HOSTILE, stage=HOSTILE, guest_ns=1),
        line("vm.error", MS, HOSTILE, what=HOSTILE),
        line("accel.probe", 1, HOSTILE, accel=HOSTILE),
    ]
    text = paint(lines, [*lines, *boot()])
    seen = Seen(text)
    assert seen.tags.count("script") == 1
    assert "img" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_restore_is_called_one_and_has_its_stages() -> None:
    drawn = paint(restore())
    assert "<title>Restore of VM a1b2</title>" in drawn
    assert "restored</span>" in drawn
    assert "<dt>total from call to first guest event</dt><dd>40.0 ms</dd>" in drawn
    assert "<dt>first exit after</dt><dd>16.0 ms</dd>" in drawn
    assert "total" not in Seen(drawn).cells
    assert {"restore.mapped", "restore.first_exit", "restore.first_guest_event"} <= set(Seen(drawn).cells)
    assert "not ready" not in drawn
    assert "2 VMs compared" in paint(restore(), boot())


def test_why_a_snapshot_failed_is_in_the_notes_and_at_its_mark() -> None:
    failed = line("snapshot.failed", MS, kind="SnapshotFailed", what=HOSTILE, trigger="after")
    drawn = paint([*boot(), failed])
    assert Seen(drawn).tags.count("script") == 1
    (more,) = [value for name, value in Seen(drawn).attributes if name == "data-more" and value and "Failed" in value]
    assert drawn.count(f": {escape(more)}</li>") == 1


def test_boots_stand_side_by_side_with_what_moved_above() -> None:
    text = paint(boot("a", 80), boot("b", 120))
    assert Seen(text).tags.count("article") == 2
    assert "the phase that differs most is boot_wait" in text
    assert text.index("What moved") < text.index("boot-1")


def test_of_many_boots_some_are_drawn_and_the_rest_counted() -> None:
    text = paint([event for number in range(MAX_BOOTS + 3) for event in boot(f"v{number}")])
    assert Seen(text).tags.count("article") == MAX_BOOTS
    assert "3 more boots are in the comparison only." in text


def test_a_boot_without_anything_to_draw_is_named() -> None:
    assert "no phases and no guest stages" in paint([line("guest.heartbeat", 1, counter=1)])


def test_an_element_escapes_text_and_attributes_but_not_markup() -> None:
    made = element("p", "<a>", Markup("<b>x</b>"), None, title='"<', data_x=1, open=True, hidden=False, id=None)
    assert made == '<p title="&quot;&lt;" data-x="1" open>&lt;a&gt;<b>x</b></p>'


@given(st.integers(1, 1 << 63))
def test_ticks_are_round_few_and_in_the_axis(span_ns: int) -> None:
    marks = ticks(span_ns)
    assert marks[0] == 0
    assert marks[-1] <= span_ns
    assert len(marks) <= TICKS + 1
    assert len(marks) >= 2
    assert str(marks[1]).rstrip("0") in ("1", "2", "5")


def test_an_absurd_stage_is_off_the_axis_with_its_value() -> None:
    text = paint([*boot(), line("guest.boot_time", 90 * MS, stage="liar", guest_ns=(1 << 64) - 1)])
    cells = Seen(text).cells
    at = cells.index("liar")
    assert cells[at + 1 : at + 4] == ["", "18446744073709 ms, off the axis", ""]
    assert 'data-more="off the axis: says 18446744073709 ms"' in text
    shares = [float(cell[:-1]) for cell in cells if cell.endswith("%")]
    assert max(shares) == 100.0


def test_a_cancelled_boot_says_so() -> None:
    text = paint([phase("total", 0, 3 * MS, failed=True), line("vm.state", 3 * MS, state="stopped")])
    assert 'class="badge">cancelled<' in text


@pytest.mark.parametrize("attempts", [2])
def test_a_failed_boot_says_so(attempts: int) -> None:
    tries = [phase("boot", n * MS, MS, "total", failed=True, attempt=n) for n in range(attempts)]
    text = paint([*tries, phase("total", 0, 3 * MS, failed=True), line("vm.error", 3 * MS, what="it broke")])
    assert 'class="badge bad">failed<' in text
    assert "boot (attempt 1) (failed)" in text
