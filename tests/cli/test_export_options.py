"""Options of `keras-kd export` that are refused before any work."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--mean", "0"), "`--mean` and `--std` belong together"),
        (("--std", "255"), "`--mean` and `--std` belong together"),
        (("--mean", "a", "--std", "255"), "numbers separated by commas"),
    ],
)
def test_half_a_normalization_is_refused_in_one_line(run, tmp_path, models, arguments, reason):
    code, out, err = run("export", models["good"], *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert list(tmp_path.iterdir()) == []


def test_int8_without_calibration_names_the_option(run, tmp_path, models, image_file):
    code, _, err = run("export", models["good"], "--evaluation", image_file, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "`--calibration DATA` on the command line" in err
    assert list(tmp_path.iterdir()) == []
