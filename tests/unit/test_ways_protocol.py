"""The protocol of the study of ways to train: log, chosen settings, what runs once, and which files are refused."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_parts import BENCHMARKS, COSTS, commit, costs_of, import_study, load_own_study, make_entry

from bigincubate.errors import ConfigError


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    with import_study() as modules:
        yield modules


@pytest.fixture(scope="module")
def costs(parts: Any) -> Any:
    return parts.lengths.Costs(parts.definition.load_study("digits"))


@pytest.fixture
def own(parts: Any, tmp_path: Path) -> Any:
    return load_own_study(parts, tmp_path)


def test_log_keeps_every_attempt_and_the_first_result(parts: Any, tmp_path: Path) -> None:
    log = parts.log.TrialLog(tmp_path / "trials.jsonl")
    key = {"split": "development", "way": "expand", "budget": 0.5, "seed": 0, "index": 0, "sets_digest": "a"}
    key["version"] = "1"
    log.append({**key, "error": "no space left", "diverged": False})
    assert log.results() == {}
    log.append({**key, "metrics": {"loss": 1.0}, **COSTS})
    log.append({**key, "metrics": {"loss": 2.0}, **COSTS})
    log.append({**key, "index": 1, "error": "not finite", "diverged": True})
    assert len(log.read()) == 4
    first, diverged = log.results().values()
    assert first["metrics"] == {"loss": 1.0}
    assert diverged["index"] == 1


def test_settings_are_chosen_from_complete_trials_only(parts: Any, own: Any, costs: Any) -> None:
    costs = costs_of(parts, costs, own)
    trials = parts.log.tuning_trials(costs)
    results = {trial.key: make_entry(trial) for trial in trials[1:]}
    with pytest.raises(ConfigError, match=f"1 of {len(trials)} tuning trials are missing"):
        parts.log.choose_settings(costs, results)
    results[trials[0].key] = make_entry(trials[0])
    parts.log.write_chosen(own, parts.log.choose_settings(costs, results), [])
    chosen, _ = parts.log.read_chosen(own)
    assert chosen["expand"]["2"]["settings"] == own.draw(own.ways["expand"], 0)


def test_point_with_the_lowest_loss_is_chosen(parts: Any, costs: Any) -> None:
    trials = parts.log.tuning_trials(costs)
    results = {trial.key: make_entry(trial, 1 + abs(trial.index - 7)) for trial in trials}
    best = next(t for t in trials if (t.way.name, t.budget, t.index) == ("expand", 0.5, 7))
    results[best.key] = {**make_entry(best), "diverged": True}
    del results[best.key]["metrics"]
    text = parts.log.choose_settings(costs, results)
    chosen = tomllib.loads(text)
    assert chosen["incubate_short"]["0.5"]["index"] == 7
    assert chosen["expand"]["0.5"]["index"] == 6  # point 7 diverged


def test_validation_trials_need_committed_settings_that_do_not_change(parts: Any, own: Any, costs: Any) -> None:
    def check(entries: list[dict[str, Any]]) -> None:
        found = parts.log.read_chosen(own)
        parts.log.check_protocol(own, found and found[1], entries)

    with pytest.raises(ConfigError, match="is missing"):
        check([])
    own.settings_file.write_text(_settings(parts, own, costs))
    with pytest.raises(ConfigError, match=r"settings-digits\.toml is not committed"):
        check([])
    commit(own.file.parent)
    check([])
    _, digest = parts.log.read_chosen(own)
    check([{"split": "validation", "settings_digest": digest}])
    with pytest.raises(ConfigError, match="validation trials with the settings other"):
        check([{"split": "validation", "settings_digest": "other"}])
    with pytest.raises(ConfigError, match="validation trials with the settings other"):
        parts.log.write_chosen(own, "[expand]\n", [{"split": "validation", "settings_digest": "other"}])
    own.file.write_text(own.file.read_text() + "# changed\n")
    with pytest.raises(ConfigError, match=r"digits\.toml is not committed"):
        check([])


def test_validation_trial_is_not_repeated_with_another_definition(parts: Any, costs: Any) -> None:
    trial = parts.log.final_trials(costs, None)[0]
    parts.log.check_once([trial], {trial.key: {}})
    with pytest.raises(ConfigError, match="runs once"):
        parts.log.check_once([trial], {(*trial.key[:-1], "other"): {}})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('unit = "TFLOP"', 'unit = "steps"', "unit: Input should be 'incubation' or 'TFLOP' (given: 'steps')"),
        ('name = "bits', 'nam = "bits', "unknown key 'metric.nam'; did you mean 'metric.name'?"),
        ("workers = 4", 'workers = "4"', "workers: Input should be a valid integer (given: '4')"),
        ("max_remainder = 0.005", "", "the key 'max_remainder' is missing"),
        ("lead = 0.02", 'lead = "a"', "primary.lead: Input should be a valid number (given: 'a')"),
        ("{ absolute = 0.02 }", "-1", "primary.margin.value: Input should be greater than 0 (given: -1)"),
        (
            '["incubate_short", "expand", 25]',
            '["incubate_short"]',
            "primary.comparisons.0: expected [way, rival, budget]",
        ),
        (
            '["incubate_short", "expand", 25]',
            '["incubate_short", "expand", 7]',
            "there is no way incubate_short with the",
        ),
        ('kind = "end_to_end"', 'kind = "plain"', "ways.end_to_end.kind: Input should be 'incubate', "),
        ('tuned_as = "expand"', 'tuned_as = "grow"', "ways.expand_best.tuned_as: there is no way grow"),
        ('tuned_as = "expand"', 'tuned_as = "expand"\ntuned_budget = 7', "ways.expand_best.tuned_budget: 7 is not one"),
        ('tuned_as = "expand"', "", "ways.expand_best: set tuned_as, because its workers already use the"),
        ("{ choice = [", "{ chioce = [", "unknown key 'ways.incubate_short.space.incubate.init.chioce'; did you mean"),
        ("{ log = [5e-4, 1.5e-2] }", "{ log = [5e-4] }", "space.pretrain.train.lr.log: List should have at least 2"),
        (
            "{ log = [5e-4, 1.5e-2] }",
            "{ log = [0, 1] }",
            "space.pretrain.train.lr: expected [low, high] with low <= high",
        ),
        ("{ log = [5e-4, 1.5e-2] }", "3", "space.pretrain.train.lr: Input should be a valid dictionary"),
        ("[tuning]", "[tunin]", "the key 'tuning.points' is missing; the key 'tuning.budgets' is missing; the key"),
        ("# Ways", "\xff Ways", "not valid TOML: "),
        ("workers = 4", "workers = 4\nways = 1", "not valid TOML: "),
        ("workers = 4", 'workers = 4\nsettings_of = "own"', "settings_of = 'own': that study does not choose settings"),
        ("workers = 4", "workers = 4\nsettings_of = 5", "settings_of: Input should be a valid string (given: 5)"),
        ('name = "docs-llama"', 'name = ".."', "name: String should match pattern"),
    ],
)
def test_error_in_a_definition_is_one_line_that_names_the_key(
    parts: Any, tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = (BENCHMARKS / "ways_study" / "docs-llama.toml").read_text()
    assert old in text
    (tmp_path / "own.toml").write_bytes(text.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(ConfigError) as refused:
        parts.definition.load_study(str(tmp_path / "own.toml"))
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'own.toml'}: ")
    assert says in message
    assert "\n" not in message


FINISHED = {"split": "development", "way": "expand", "budget": 1.0, "seed": 0, "index": None, "sets_digest": "a"}
FINISHED |= {"version": "1", "metrics": {"loss": 1.0}, **COSTS}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": "test"}, "split: Input should be 'development' or 'validation'"),
        ({"split": "validation"}, "has the key settings_digest"),
        ({"metrics": None}, "metrics: Input should be a valid dictionary"),
        ({"metrics": {}}, "metrics: Dictionary should have at least 1 item"),
        ({"metrics": {"loss": float("nan")}}, "metrics.loss: Input should be a finite number"),
        ({"flops": 0}, "flops: Input should be greater than 0"),
        ({"seconds": -1.0}, "seconds: Input should be greater than or equal to 0"),
        ({"device": 5}, "device: Input should be a valid string"),
        ({"torch": [2]}, "torch: Input should be a valid string"),
        ({"metrics": ...}, "the key 'error' is missing"),
        *(({name: ...}, f"the key '{name}' is missing") for name in FINISHED if name != "metrics"),
    ],
)
def test_line_that_is_no_trial_is_refused(parts: Any, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    file = tmp_path / "trials.jsonl"
    line = {name: value for name, value in (FINISHED | change).items() if value is not ...}
    file.write_text(f"{json.dumps(FINISHED)}\n{json.dumps(line)}\n")
    with pytest.raises(ConfigError, match=rf"^{file}: .*{reason}"):
        parts.log.TrialLog(file).results()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[expand.2", "[other.2", "has no settings of expand at every tuned budget; restore"),
        ("[expand.2]", "[expand.2", "not valid TOML"),
        ("loss = 1.0", "", "does not fit the definition; restore this file or"),
        ('"share.pretrain" = ', '"share.pretrained" = ', "does not fit the definition"),
        ("index = 0", 'index = "0"', "index: Input should be a valid integer"),
    ],
)
def test_settings_that_do_not_fit_the_definition_are_refused(
    parts: Any, own: Any, costs: Any, old: str, new: str, says: str
) -> None:
    text = _settings(parts, own, costs)
    assert old in text
    own.settings_file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says) as refused:
        parts.log.read_chosen(own)
    assert str(refused.value).startswith(str(own.settings_file))


def _settings(parts: Any, study: Any, costs: Any) -> str:
    """Return the content of the settings file of a study, whose trials all have the same loss."""
    costs = costs_of(parts, costs, study)
    trials = parts.log.tuning_trials(costs)
    text: str = parts.log.choose_settings(costs, {trial.key: make_entry(trial) for trial in trials})
    return text
