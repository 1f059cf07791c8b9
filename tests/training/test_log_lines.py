"""What a training shows: fixed columns that fit a terminal, whatever the method logs; nothing cut, nothing made up."""

import pytest

from smolpost.training.log_lines import EVERY, WIDTH, Table, clock

SFT = {
    "loss": 5.605, "grad_norm": 1.368, "learning_rate": 1.18e-4, "entropy": 5.98, "mean_token_accuracy": 0.087,
    "num_tokens": 11157, "tokens_per_second": 20624.3, "tflops": 0.006, "peak_gb": 0.4732, "epoch": 0.92,
}  # fmt: skip
APO = SFT | {"loss": 0.9946, "rewards/margins": -1.192e-08, "rewards/accuracies": 0.75, "logps/chosen": -173.0}


@pytest.mark.parametrize(
    "seconds, text",
    [(None, "?"), (0, "0s"), (99, "99s"), (100, "2m"), (5990, "1h40m"), (43500, "12h05m"), (273600, "3d04h")],
)
def test_a_duration_takes_six_characters(seconds, text):
    assert clock(seconds) == text and len(text) <= 6


def test_a_line_has_every_number_of_a_step_with_its_unit():
    assert Table(5000, under_run=True).lines(12, SFT, 1234.0, 10000.0) == [
        "                   learning    grad token    tokens  peak  stage    run",
        "     step     loss     rate    norm   acc     per s    GB   left   left",
        "  12/5000   5.6050 1.18e-04   1.368    9%    20,624  0.47    21m  3h07m",
    ]


def test_pairs_show_margin_and_accuracy_first_and_fit_the_terminal():
    head, units, line = Table(5000, under_run=True).lines(12, APO, 60.0, None)
    assert head.split() == ["learning", "grad", "pair", "tokens", "peak", "stage", "run"]
    assert line.split() == ["12/5000", "0.9946", "1.18e-04", "1.368", "-1.2e-08", "75%", "20,624", "0.47", "60s", "?"]
    assert len(units) == len(line) <= WIDTH


@pytest.mark.parametrize(
    "more, heads",
    [
        ({"rewards/margins": 0.5, "kl": 0.25}, ["margin", "KL"]),  # KTO
        ({"reward": 0.5, "completions/mean_length": 1234.5}, ["reward", "tokens"]),  # GRPO
        ({"on_policy": 0.5, "samples/mean_length": 12.0, "samples/stopped": 1.0}, ["tokens", "policy"]),  # distill
    ],
)
def test_other_methods_show_theirs(more, heads):
    entry = {key: value for key, value in SFT.items() if key != "mean_token_accuracy"} | more
    _, units, line = Table(500, under_run=True).lines(12, entry, 60.0, 0.0)
    assert units.split()[4:-5] == heads and len(line) <= WIDTH


def test_what_is_not_logged_or_not_known_is_said_and_not_invented():
    first = {key: value for key, value in SFT.items() if key not in ("tokens_per_second", "grad_norm")}
    line = Table(12, under_run=False).lines(1, first, None, None)[-1]
    assert line.split() == ["1/12", "5.6050", "1.18e-04", "-", "9%", "-", "0.47", "?"]


def test_the_head_comes_again_and_with_a_new_column():
    table = Table(100, under_run=False)
    printed = [table.lines(step, SFT, 1.0, None) for step in range(1, EVERY + 2)]
    assert [len(lines) for lines in printed] == [3] + [1] * (EVERY - 1) + [3]
    assert len(table.lines(22, SFT, 1.0, None)) == 1
    assert "margin" in table.lines(23, APO, 1.0, None)[1]


@pytest.mark.parametrize(
    "value, text", [(float("nan"), "nan"), (float("inf"), "inf"), (1e-7, "1.0e-07"), (0.0, "0.0000")]
)
def test_losses_that_are_none_are_shown(value, text):
    assert Table(12, under_run=False).lines(1, SFT | {"loss": value}, None, None)[-1].split()[1] == text
