from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import pytest

from medkd.report import figures
from medkd.report.figures import Line, Pairing, Sample

HOSTILE = '</svg><script>x</script>$\\alpha$ & "q" \''


def drawings() -> dict[str, str]:
    samples = [Sample("A <b>", [0.1, 0.5, 0.6], 0.4, 0.2, 0.6, 0, "∞ in 1 case"), Sample("B", [0.7], 0.7, series=1)]
    pairing = Pairing("A", HOSTILE, {"p": (0.1, 0.2), "q": (0.4, 0.4), "r": (0.5, 0.3)}, 0.0, -0.1, 0.1)
    return {
        "curve": figures.curve_panel("loss", [Line("a", range(1000), [1 / (i + 1) for i in range(1000)])]),
        "box": figures.box_plot(samples, HOSTILE, name="box"),
        "paired": figures.paired_plot(pairing, "Dice", name="paired"),
        "cost": figures.cost_plot([(samples[0], 1e6), (samples[1], 1e6), (samples[1], 1e8)], "Dice", name="cost"),
    }


def test_figures_are_well_formed_deterministic_and_without_links():
    first, second = drawings(), drawings()
    assert first == second
    for svg in first.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert "viewBox" in root.attrib
        for element in root.iter():
            assert element.tag not in {"script", "metadata", "image"}
            assert element.get("href", "#").startswith("#")
        assert "http" not in svg
        assert not any(color in svg for color in figures.VARIABLES)


def test_text_stays_text_and_is_escaped():
    box = ElementTree.fromstring(drawings()["box"])
    texts = ["".join(element.itertext()) for element in box.iter("text")]
    assert HOSTILE in texts
    assert box.get("aria-label") == f"Distribution of {HOSTILE} over patients"
    assert "∞ in 1 case" in texts


def test_ids_of_different_figures_do_not_meet():
    ids = [[e.get("id") for e in ElementTree.fromstring(svg).iter() if e.get("id")] for svg in drawings().values()]
    flat = [name for names in ids for name in names]
    assert len(flat) == len(set(flat))


def test_a_figure_of_its_own_has_colors_and_a_namespace():
    svg = figures.standalone(drawings()["box"])
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--" not in svg
    assert "#1668b0" in svg


def test_small_values_keep_their_digits_on_the_axis():
    svg = figures.curve_panel("lr", [Line("a", [0, 1], [0.0, 0.0075])])
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("text")]
    assert "0.0025" in texts or "0.002" in texts


def test_non_finite_points_and_empty_figures_are_no_error():
    figures.curve_panel("x", [Line("a", [0, 1, 2], [math.nan, math.inf, 1.0]), Line("b", [], [])])
    figures.box_plot([Sample("a", [])], "Dice", name="b")
    figures.paired_plot(Pairing("a", "b"), "Dice", name="p")


def test_long_curves_are_thinned_with_a_band():
    short = figures.curve_panel("x", [Line("a", range(100), [float(i % 7) for i in range(100)])])
    long = figures.curve_panel("x", [Line("a", range(100_000), [float(i % 7) for i in range(100_000)])])
    assert len(long) < 5 * len(short)


def test_drawing_leaves_matplotlibs_settings_alone():
    before = dict(mpl.rcParams)
    drawings()
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(("a", "b"), [("x y", "x-y"), ("größe", "gr-e"), ("a" * 90, "a" * 91)])
def test_slugs_of_different_names_differ(a, b):
    assert figures.slug(a) != figures.slug(b)
    assert figures.slug("val_mean_dice") == "val_mean_dice"
