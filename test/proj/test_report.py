"""The report of the ladder on runs made up by hand, whose ratios, shares and intervals are worked out beside it."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.proj.ladder import report
from meanflow_audio_codec.proj.ladder.report import (
    AUDIO,
    MNIST,
    PREDICTIONS,
    Row,
    fill,
    judge,
    measure,
    paired_runs,
    verdict,
)

CELLS = ("backbone=mlp,tokens=mdct", "backbone=conv,tokens=reshape")
MLP, CONV = "mlp, mdct", "conv, reshape"
SAME, TWICE, GAP, IMPROVED = PREDICTIONS

# Token errors over the autoencoder's, which is 0.5 at seed 0, 0.25 at seed 1, 1.0 at seed 2; qualities as they are.
ERROR_OF_THE_AUTOENCODER = (0.5, 0.25, 1.0)
RATIOS = {
    ("mlp", "flow_matching"): (1.01, 0.99, 1.0),
    ("mlp", "mean_flow"): (2.1, 1.9, 2.0),
    ("mlp", "improved_mean_flow"): (1.5, 1.5, 1.5),
    ("conv", "flow_matching"): (1.2, 1.2, 1.2),
    ("conv", "mean_flow"): (1.9, 2.3, 2.1),
    ("conv", "improved_mean_flow"): (1.95, 2.0, 2.05),
}
QUALITY = {
    ("mlp", "autoencoder"): (90.0, 90.0, 90.0),
    ("mlp", "flow_matching"): (100.0, 110.0, 90.0),  # at one evaluation; at many it is 10
    ("mlp", "mean_flow"): (28.0, 20.0, 26.0),
    ("mlp", "improved_mean_flow"): (14.0, 15.0, 13.0),
    ("conv", "autoencoder"): (90.0, 90.0, 90.0),
    ("conv", "flow_matching"): (50.0, 50.0, 50.0),
    ("conv", "mean_flow"): (40.0, 44.0, 36.0),
    ("conv", "improved_mean_flow"): (44.0, 33.0, 39.6),
}
SHARES = {  # (one - quality) / (one - 10)
    ("mlp", "mean_flow"): (72 / 90, 90 / 100, 64 / 80),
    ("mlp", "improved_mean_flow"): (86 / 90, 95 / 100, 77 / 80),
    ("conv", "mean_flow"): (10 / 40, 6 / 40, 14 / 40),
    ("conv", "improved_mean_flow"): (6 / 40, 17 / 40, 10.4 / 40),
}
IMPROVEMENTS = {"mlp": (50.0, 25.0, 50.0), "conv": (-10.0, 25.0, -10.0)}  # in %


def write_run(folder, objective, data, error, quality, seed, finished=True):
    folder.mkdir(parents=True)
    numbers = (1,) if objective == "autoencoder" else (1, data.many)
    last = {f"{data.x_mse}_nfe{nfe}": error for nfe in numbers} | {f"{data.quality}_nfe1": quality}
    if objective != "autoencoder":
        last[f"{data.quality}_nfe{data.many}"] = 10.0
    rows = [{"step": 2, "train/loss": 1.0}, {"step": 2, f"{data.x_mse}_nfe1": 99.0}, {"step": 4} | last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"seed": seed, "total_steps": 4, "objective": {"name": objective}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints" / ("4" if finished else "2")).mkdir(parents=True)


def write_sweep(workdir, data, seeds=3):
    for cell in CELLS:
        backbone = cell.removeprefix("backbone=").partition(",")[0]
        for objective in (report.AE, report.FM, report.MF, report.IMF):
            for seed in range(seeds):
                error = ERROR_OF_THE_AUTOENCODER[seed] * RATIOS.get((backbone, objective), (1.0,) * 3)[seed]
                quality = QUALITY[backbone, objective][seed]
                write_run(run_folder(workdir, data, cell, objective, seed), objective, data, error, quality, seed)


def run_folder(workdir, data, cell, objective, seed):
    return workdir / data.part / f"objective={objective},{cell}" / f"seed{seed}"


def unfinish(folder):
    (folder / "checkpoints" / "4").rename(folder / "checkpoints" / "2")


def interval(values):
    """Mean and half-width by the library's own Student interval."""
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values)
    )
    return (low + high) / 2, (high - low) / 2


def assert_rows(rows, expected):
    """`expected`: {label: the values of the seeds}."""
    assert {row.label for row in rows} == set(expected) and len(rows) == len(expected)
    for row in rows:
        values = expected[row.label]
        mean, half_width = interval(values) if len(set(values)) > 1 else (values[0], 0.0)
        assert row.mean == pytest.approx(mean, rel=1e-9)
        assert row.half_width == pytest.approx(half_width, rel=1e-9, abs=1e-12)


@pytest.fixture(params=[MNIST, AUDIO], ids=["mnist", "audio"])
def data(request):
    return request.param


@pytest.fixture
def workdir(tmp_path, data):
    write_sweep(tmp_path, data)
    return tmp_path


def rows_of(workdir, data, prediction):
    return measure(prediction, paired_runs(workdir, data), data)


# --- what is measured


def test_runs_are_paired_by_cell_and_seed(workdir, data):
    runs = paired_runs(workdir, data)
    assert set(runs) == {MLP, CONV}
    for seeds in runs.values():
        assert set(seeds) == {0, 1, 2}
        for seed, found in seeds.items():
            assert set(found) == {"autoencoder", "flow_matching", "mean_flow", "improved_mean_flow"}
            assert {run.config["objective"]["name"] for run in found.values()} == set(found)
            assert {run.seed for run in found.values()} == {seed}


def test_ratio_of_flow_matching_to_the_autoencoder(workdir, data):
    rows = rows_of(workdir, data, SAME)
    assert_rows(rows, {MLP: RATIOS["mlp", "flow_matching"], CONV: RATIOS["conv", "flow_matching"]})
    mlp = next(row for row in rows if row.label == MLP)  # 4.3027 is Student's t for three values
    assert mlp.half_width == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)


def test_ratio_of_mean_flow_to_the_autoencoder(workdir, data):
    expected = {
        f"{name}, {objective}": RATIOS[name.partition(",")[0], objective]
        for name in (MLP, CONV)
        for objective in ("mean_flow", "improved_mean_flow")
    }
    assert_rows(rows_of(workdir, data, TWICE), expected)


def test_share_of_the_gap_that_is_closed(workdir, data):
    expected = {
        f"{name}, {objective}": SHARES[name.partition(",")[0], objective]
        for name in (MLP, CONV)
        for objective in ("mean_flow", "improved_mean_flow")
    }
    assert_rows(rows_of(workdir, data, GAP), expected)


def test_improvement_is_paired_by_seed(workdir, data):
    assert_rows(rows_of(workdir, data, IMPROVED), {MLP: IMPROVEMENTS["mlp"], CONV: IMPROVEMENTS["conv"]})


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda prediction: prediction.name)
def test_what_is_not_finished_is_left_out(tmp_path, prediction):
    """A seed with an unfinished run counts no more, a cell without a whole seed has no row."""
    write_sweep(tmp_path, MNIST)
    unfinish(run_folder(tmp_path, MNIST, CELLS[0], "mean_flow", 1))
    for seed in range(3):
        unfinish(run_folder(tmp_path, MNIST, CELLS[1], ("autoencoder", "flow_matching", "mean_flow")[seed], seed))
    rows = rows_of(tmp_path, MNIST, prediction)
    values = {
        SAME: {MLP: RATIOS["mlp", "flow_matching"]},
        TWICE: {f"{MLP}, {name}": RATIOS["mlp", name] for name in ("mean_flow", "improved_mean_flow")},
        GAP: {f"{MLP}, {name}": SHARES["mlp", name] for name in ("mean_flow", "improved_mean_flow")},
        IMPROVED: {MLP: IMPROVEMENTS["mlp"]},
    }[prediction]
    assert_rows(rows, {label: (seeds[0], seeds[2]) for label, seeds in values.items()})


def test_one_seed_has_no_interval(tmp_path):
    write_sweep(tmp_path, MNIST, seeds=1)
    for prediction in PREDICTIONS:
        assert all(row.half_width is None for row in rows_of(tmp_path, MNIST, prediction))
    assert rows_of(tmp_path, MNIST, IMPROVED)[0].mean == pytest.approx(-10)  # conv comes first
    assert [row.mean for row in rows_of(tmp_path, MNIST, SAME)] == pytest.approx([1.2, 1.01])


def test_ablations_are_compared_with_the_default_of_their_seed(tmp_path, data):
    qualities = {
        "objective=improved_mean_flow": (4.0, 8.0),
        "objective=mean_flow": (6.0, 10.0),
        "lr=1,width=2": (2.0, 2.0),
        "width=3": (1.0,),
        "width=4": (1.0,),
    }
    for name, values in qualities.items():
        for seed, quality in enumerate(values):
            folder = tmp_path / data.ablations / name / f"seed{seed}"
            write_run(folder, "improved_mean_flow", data, 1.0, quality, seed, finished=name != "width=4")
    assert report.ablation_table(tmp_path, data).splitlines() == [
        f"| against objective=improved_mean_flow | {data.quality}_nfe1 | {data.quality}_nfe{data.many} |",
        "| --- | --- | --- |",
        "| width=3 | 0.25 | 1.00 |",
        "| lr=1, width=2 | 0.38 [0.25, 0.50] | 1.00 [1.00, 1.00] |",
        "| objective=mean_flow | 1.38 [1.25, 1.50] | 1.00 [1.00, 1.00] |",
    ]


# --- what is made of it


@pytest.mark.parametrize(
    ("prediction", "row", "word"),
    [
        (SAME, (1.01, 0.005), "holds"),
        (SAME, (1.01, 0.02), "open"),  # a wide interval is no evidence
        (SAME, (1.05, 0.06), "open"),
        (SAME, (1.05, 0.02), "fails"),
        (SAME, (0.95, 0.02), "fails"),
        (SAME, (1.0, None), "open"),  # one seed tells nothing
        (TWICE, (2.04, 0.05), "holds"),
        (TWICE, (2.04, 0.07), "open"),
        (TWICE, (1.5, 0.3), "fails"),
        (GAP, (0.9, 0.3), "holds"),
        (GAP, (0.6, 0.2), "open"),
        (GAP, (0.2, 0.2), "fails"),
        (IMPROVED, (10.0, 5.0), "holds"),
        (IMPROVED, (10.0, 15.0), "open"),
        (IMPROVED, (-10.0, 5.0), "fails"),
        (IMPROVED, (10.0, None), "open"),
    ],
)
def test_when_a_claim_holds(prediction, row, word):
    assert judge(Row("cell", *row), prediction.bounds) == word


def test_verdict_is_that_of_all_cells_and_counts_them():
    good, better, bad = Row("a", 2.0, 0.05), Row("b", 2.06, 0.1), Row("c", 3.5, 0.1)
    claim = "- **a good one-step sampler has twice the autoencoder's token error (within 5 %)**: "
    line = verdict(TWICE, [good, Row("b", 2.01, 0.1), Row("c", 1.99, 0.05)])
    assert line.startswith(claim + "holds. ") and line.endswith(". Single cells: holds in 2, open in 1.")
    assert verdict(TWICE, [bad, Row("d", 3.6, 0.1)]).startswith(claim + "fails. ")
    assert verdict(TWICE, [good]).startswith(claim + "open. ")  # of one cell there is no spread
    assert verdict(TWICE, []) == claim + "no cell is complete."
    line = verdict(TWICE, [good, better, bad])
    _, half_width = interval([2.0, 2.06, 3.5])
    assert line.startswith(claim + "open. ")
    assert f": {7.56 / 3:.3g} ± {half_width:.2g} over cells, from 2 to 3.5. " in line
    assert line.endswith(" Single cells: holds in 1, fails in 1, open in 1.")
    assert "\n" not in line
    names = ("a, mdct", "b, mdct", "a, reshape", "b, reshape")
    rows = [Row(name, mean, None) for name, mean in zip(names, (2.0, 2.002, 3.0, 3.1), strict=True)]
    assert "; mdct holds with 2 ± 0.013, reshape fails with 3.05 ± 0.64. " in verdict(TWICE, rows)


def test_verdicts_of_the_made_up_runs(workdir, data):
    """mlp: 1 ± .025; 2.0 ± .25 and 1.5; closed; improved by 42 ± 36 %. conv: 1.2; 2.1 ± .5, 2.0 ± .12; open."""
    words = [verdict(prediction, rows_of(workdir, data, prediction)).partition("**: ")[2] for prediction in PREDICTIONS]
    assert [(line.partition(". ")[0], line.rpartition("cells: ")[2]) for line in words] == [
        ("open", "fails in 1, open in 1."),
        ("open", "fails in 1, open in 3."),
        ("open", "holds in 2, fails in 1, open in 1."),
        ("open", "holds in 1, open in 1."),
    ]


# --- the page

PAGE = """# The ladder

Before <!-- mnist --> is no mark, for its line goes on.

<!-- mnist predictions -->
old
verdicts
<!-- /mnist predictions -->

Between.

<!-- mnist -->
<!-- /mnist -->

![FID](ladder/mnist_evaluations_images_fid.png)

<!-- audio -->
the table of audio
<!-- /audio -->
After.
"""


def test_fill_replaces_between_the_marks_alone():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\nc\n"
    filled = fill(text, {"x": "new\\1 \\g<0>\nlines\n\n"})
    assert filled == "a\n<!-- x -->\nnew\\1 \\g<0>\nlines\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\nc\n"
    assert fill(filled, {"x": "", "y": "there"}) == (
        "a\n<!-- x -->\n\n<!-- /x -->\nb\n<!-- y -->\nthere\n<!-- /y -->\nc\n"
    )
    assert fill(text, {}) == text
    twice = "<!-- x -->\n<!-- /x -->\nbetween\n<!-- x -->\n<!-- /x -->\n"
    assert fill(twice, {"x": "new"}) == "<!-- x -->\nnew\n<!-- /x -->\nbetween\n<!-- x -->\nnew\n<!-- /x -->\n"


@pytest.mark.parametrize(
    "page", ["no marks", "<!-- x -->\nno end", "no begin\n<!-- /x -->", "<!-- x y -->\n<!-- /x -->"]
)
def test_a_missing_mark_is_named(page):
    with pytest.raises(InputError, match="the page has no marks <!-- x --> and <!-- /x -->; add them"):
        fill(page, {"x": "text"})


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "documentation" / "ladder.md"
    path.parent.mkdir()
    path.write_text(PAGE)
    return path


def test_findings_twice_are_the_same_page(tmp_path, page):
    write_sweep(tmp_path, MNIST)
    report.main(["--workdir", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "old\nverdicts" not in text
    assert "<!-- audio -->\nthe table of audio\n<!-- /audio -->\nAfter.\n" in text
    assert text.startswith(PAGE.partition("old\n")[0])
    assert text.count("- **") == len(PREDICTIONS)
    table = (tmp_path / "mnist" / "table.md").read_text()
    assert table.rstrip() in text
    assert text.count("\n| mean_flow | ") == 2 and "mse_ratio_nfe1" in text  # the share of the autoencoder's error
    figures = page.with_suffix("")
    names = {f"mnist_{prediction.name}.png" for prediction in PREDICTIONS}
    shown = {"mnist_evaluations_images_fid.png"}  # and none of the sweep's others
    assert names | shown == {path.name for path in figures.glob("*.png")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures.glob("*.png"))
    assert (figures / "mnist_runs.csv").read_text() == (tmp_path / "mnist" / "runs.csv").read_text()
    report.write_findings(tmp_path, page)
    assert page.read_text() == text


def test_decoded_images_are_kept_in_few_grays(tmp_path, page):
    write_sweep(tmp_path, MNIST, seeds=1)
    samples = tmp_path / "mnist" / "objective=mean_flow,backbone=conv,tokens=mdct" / "seed0" / "samples" / "4000"
    samples.mkdir(parents=True)
    gray = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    Image.fromarray(np.stack([gray] * 3, axis=-1)).save(samples / "grid.png")
    report.write_findings(tmp_path, page)
    kept = np.asarray(Image.open(page.with_suffix("") / "mnist_by_mean_flow.png").convert("L"))
    assert kept.shape == gray.shape and np.abs(kept.astype(int) - gray).max() <= 16
    assert 2 < len(np.unique(kept)) <= 16


def test_a_mistake_ends_in_one_line(tmp_path, page):
    write_sweep(tmp_path, MNIST, seeds=1)
    page.write_text("no marks")
    with pytest.raises(SystemExit) as stopped:
        report.main(["--workdir", str(tmp_path), "--page", str(page)])
    assert stopped.value.code == "report: the page has no marks <!-- mnist --> and <!-- /mnist -->; add them"
    assert page.read_text() == "no marks"
    with pytest.raises(SystemExit) as stopped:
        report.main(["--workdir", str(tmp_path), "--page", str(tmp_path / "nowhere" / "ladder.md")])
    assert str(tmp_path / "nowhere") in stopped.value.code and "\n" not in stopped.value.code
