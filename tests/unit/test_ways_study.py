"""The study of ways to train: budgets, random points, costs, statistics and page, without training."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_parts import BENCHMARKS, costs_of, import_study, load_own_study, make_entry

from bigincubate.config import PHASES, load_recipe
from bigincubate.errors import ConfigError


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    with import_study() as modules:
        yield modules


@pytest.fixture(scope="module")
def costs(parts: Any) -> Any:
    return parts.lengths.Costs(parts.definition.load_study("digits"))


@pytest.fixture(scope="module")
def text_costs(parts: Any) -> Any:
    return parts.lengths.Costs(parts.definition.load_study("docs-llama"))


def test_every_trial_uses_its_budget(parts: Any, costs: Any) -> None:
    study = costs.study
    trials = [*parts.log.tuning_trials(costs), *parts.log.final_trials(costs, None)]
    assert {trial.way.name for trial in trials} == set(study.ways)
    for trial in trials:
        assert 0 <= trial.plan.remainder < 0.005, trial.name
        used = trial.plan.flops if trial.way.measure == "flops" else trial.plan.path_flops
        assert used == trial.plan.used_flops
        assert trial.plan.budget_flops == int(trial.budget * costs.reference[trial.way.measure])


def test_recipe_changes_give_the_planned_lengths(parts: Any, costs: Any) -> None:
    from bigincubate.planning.cost import phase_steps

    study = costs.study
    for way in study.tuned_ways:
        plan = parts.lengths.plan_trial(costs, way, study.draw(way, 0), 0.5, "development")
        recipe = study.load_recipe("development", plan.sets)
        for stage in plan.stages:
            if stage.name != "workers":
                settings = recipe.settings(stage.phase)
                steps, epoch = phase_steps(settings, 1149)
                assert steps == stage.steps
                assert settings.schedule.warmup_epochs * epoch <= min(2 * epoch, 0.1 * steps) + 0.01


def test_cost_of_a_trial_is_that_of_plan_ways(parts: Any, costs: Any) -> None:
    from bigincubate.planning.phases import make_plan
    from bigincubate.planning.ways import compare_ways

    way = costs.study.ways["incubate_short"]
    plan = parts.lengths.plan_trial(costs, way, costs.study.draw(way, 0), 0.5, "validation")
    recipe = costs.study.load_recipe("validation", plan.sets)
    counted = {key: cost for phase in PHASES for key, cost in costs.costs(recipe, phase).items()}
    wanted, *_ = compare_ways(recipe, make_plan(recipe), 1437, counted)
    found = parts.lengths.describe_cost(costs, way, plan)
    assert (found["flops"], found["path_flops"]) == (wanted.flops, wanted.separate_path_flops)
    assert found["connected_path_flops"] == pytest.approx(wanted.connected_path_flops, abs=1)
    for name in ("memory_before", "memory_last", "sent_before", "sent_last"):
        assert found[name] == getattr(wanted, name)


def test_budget_one_is_the_incubation_of_the_recipe(costs: Any) -> None:
    # the FLOPs and the critical path that `bigincubate plan digits --ways --json` prints
    assert costs.reference == {"flops": 8_719_250_817_024, "path": 5_649_590_943_744}


def test_budget_that_too_large_a_share_of_remains_unused_is_refused(parts: Any, costs: Any) -> None:
    way = costs.study.ways["end_to_end"]
    with pytest.raises(ConfigError, match="of the budget remain"):
        parts.lengths.plan_trial(costs, way, costs.study.draw(way, 0), 0.0011, "development")


def test_points_are_reproducible_and_differ(parts: Any, costs: Any) -> None:
    study = costs.study
    points = [study.draw(study.ways["expand"], index) for index in range(12)]
    assert points == [parts.definition.load_study("digits").draw(study.ways["expand"], n) for n in range(12)]
    assert len({point["finetune.train.lr"] for point in points}) == 12
    assert {point["expand.init"] for point in points} == {"grow", "stack", "g_stack"}
    assert all(2e-4 <= point["pretrain.train.lr"] <= 8e-3 for point in points)
    assert points[0] == {
        "pretrain.train.lr": 0.0015,
        "finetune.train.lr": 0.00091,
        "share.pretrain": 0.719,
        "meta_depth": 1,
        "expand.init": "stack",
        "growth": "keep_peak",
    }


def test_expansion_has_as_many_points_as_all_ways_of_incubation_together(parts: Any) -> None:
    """All other ways have 12. Decentralized modules see other data than their rivals, so they are no such way."""
    for name in ("digits", "cifar20", "docs-llama"):
        study = parts.definition.load_study(name)
        points = {way.name: way.points for way in study.tuned_ways}
        for measure, rival in (("flops", "expand"), ("path", "expand_average")):
            own = [way for way in study.tuned_ways if way.measure == measure and way.name.startswith("incubate")]
            assert points.pop(rival) == sum(way.points for way in own), (name, rival)
        assert set(points.values()) == {12}


def test_study_with_the_settings_of_another_has_its_spaces_and_no_search(parts: Any) -> None:
    wide, deep = (parts.definition.load_study(name) for name in ("cifar20", "cifar20-32"))
    assert deep.settings_file == wide.settings_file
    assert deep.tuned_ways == []
    assert {name: way.space for name, way in deep.ways.items()} == {n: wide.ways[n].space for n in deep.ways}


def test_other_budgets_use_the_nearest_tuned_one(parts: Any, costs: Any) -> None:
    ways, budgets = costs.study.ways, costs.study.tuning.budgets
    expand = ways["expand"]
    assert parts.lengths.nearest_budget(costs, expand, 0.25, expand, budgets) == 0.5
    assert parts.lengths.nearest_budget(costs, expand, 2, expand, budgets) == 2
    for name in ("incubate_short", "expand", "end_to_end", "meta_alone", "expand_average"):  # equally near to both
        assert parts.lengths.nearest_budget(costs, ways[name], 1, ways[name], budgets) == 2
    # a critical path of 2 x 5.65 TFLOPs is nearer to 17.4 than to 4.4 TFLOPs in total
    assert parts.lengths.nearest_budget(costs, ways["expand_path"], 2, expand, budgets) == 2
    assert parts.lengths.nearest_budget(costs, ways["expand_path"], 1, expand, budgets) == 0.5


def test_way_uses_the_settings_of_another_way_or_of_a_given_budget(parts: Any) -> None:
    study = parts.definition.load_study("digits-controls")
    costs = parts.lengths.Costs(study)
    chosen, _ = parts.log.read_chosen(study)
    for name, own in (("incubate_half", "incubate_short"), ("expand_half", "expand"), ("meta_half", "meta_alone")):
        assert parts.log.final_settings(costs, study.ways[name], 1, chosen) == chosen[own]["0.5"]["settings"]
    assert parts.log.final_settings(costs, study.ways["expand"], 1, chosen) == chosen["expand"]["2"]["settings"]

    # the control has the meta model and the schedule of incubation; fine-tuning gets the FLOPs of the modules
    control = next(trial for trial in parts.log.final_trials(costs, chosen) if trial.way.name == "expand_same")
    same = chosen["incubate_short"]["2"]["settings"]
    assert control.settings == same
    incubated = parts.lengths.plan_trial(costs, study.ways["incubate_short"], same, 1, "validation")
    stages = {stage.name: stage.steps for stage in control.plan.stages}
    assert stages["pretrain"] == incubated.stages[0].steps
    assert stages["finetune"] > incubated.stages[2].steps
    recipes = [study.load_recipe("validation", plan.sets) for plan in (control.plan, incubated)]
    for phase in ("pretrain", "finetune"):
        ours, other = (recipe.settings(phase) for recipe in recipes)
        assert (ours.train.lr, ours.schedule.name) == (other.train.lr, other.schedule.name)
        assert ours.schedule.warmup_epochs == other.schedule.warmup_epochs
    assert recipes[0].expand.init == recipes[1].incubate.init == "grow"


def test_plan_counts_what_is_left_at_the_rate_of_the_log(parts: Any, costs: Any, tmp_path: Path) -> None:
    own = load_own_study(parts, tmp_path)
    costs, log = costs_of(parts, costs, own), parts.log.TrialLog(own.log_file)
    first = parts.log.tuning_trials(costs)[0]
    assert (first.way.name, first.budget) == ("incubate_short", 0.5)
    log.append(make_entry(first, flops=first.plan.flops, seconds=first.plan.flops / 1e9))
    lines = parts.program.describe_plan(costs, log, None).splitlines()
    row = next(line for line in lines if line.startswith("incubate_short "))
    # left: one point at budget 2, 17.4 TFLOPs, which take 4.84 hours at 1 GFLOP/s
    assert row.split() == ["incubate_short", "2", "1", "17.4", "4.84"]
    assert lines[-1].startswith("FLOP/s of a core: from the log.")
    log.file.unlink()
    log.append(make_entry(first, flops=first.plan.flops, seconds=first.plan.flops / 1e12, device="NVIDIA H200"))
    lines = parts.program.describe_plan(costs, log, None).splitlines()
    assert lines[-1].startswith("FLOP/s of a core: from the definition.")


def test_paired_interval_is_that_of_students_t(parts: Any) -> None:
    # differences -0.1, -0.2, -0.3: mean -0.2, standard deviation 0.1, t(2) = 4.303, so -0.2 ± 4.303 * 0.1 / sqrt(3)
    way, rival = {0: 0.9, 1: 0.8, 2: 0.7, 5: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0, 6: 0.0}
    found = parts.paired.compare_paired(way, rival, parts.definition.Margin(value=0.02))
    assert (found.pairs, found.rival) == (3, 1.0)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.44844, 0.04844), abs=1e-5)
    assert found.verdict == "undecided"
    assert parts.paired.compare_paired({0: 1.0}, {0: 2.0}, parts.definition.Margin(value=0.02)) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.1, "ahead"),
        (-0.1, 0.01, "not behind"),
        (0.005, 0.015, "not behind"),
        (0.01, 0.03, "behind"),
        (-0.01, 0.03, "undecided"),
    ],
)
def test_verdict_follows_from_the_interval(parts: Any, low: float, high: float, verdict: str) -> None:
    for rival, margin in (
        (1.0, parts.definition.Margin(value=0.02)),
        (4.0, parts.definition.Margin(value=0.02, absolute=True)),
    ):
        difference = parts.paired.PairedDifference(3, (low + high) / 2, low, high, rival, margin)
        assert difference.verdict == verdict


def test_trials_that_are_in_the_log_keep_their_keys(parts: Any, costs: Any) -> None:
    # a change of these digests would repeat all trials that have been run
    digests = {trial.name: trial.digest for trial in parts.log.tuning_trials(costs)}
    assert digests["development-end_to_end-0.5-seed-100-point-0"] == "418021760b1d"
    assert digests["development-meta_alone-0.5-seed-100-point-1"] == "14a8bf909f36"
    for name in ("cifar20", "digits"):  # the recipe of `digits` has moved since
        study = parts.definition.load_study(name)
        keys = {trial.key for trial in parts.log.tuning_trials(parts.lengths.Costs(study))}
        logged = {parts.log.key_of(entry) for entry in parts.log.TrialLog(study.log_file).read()}
        assert len(keys) >= 144
        assert keys <= logged, name


def test_page_says_what_is_missing_and_invents_nothing(parts: Any, costs: Any, tmp_path: Path) -> None:
    empty = parts.page.markdown(parts.page.Results(costs.study, []), None)
    assert empty.startswith("Not measured yet.")
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- ways digits: written by benchmarks/ways.py -->\nold\n<!-- ways digits: end -->\nafter\n"
    )
    parts.page.write_between_markers(page, "digits", empty)
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    with pytest.raises(ConfigError, match="no markers of the study other"):
        parts.page.write_between_markers(page, "other", empty)


@pytest.mark.parametrize(
    ("devices", "unit", "sentence"),
    [
        ([None, None], "core-seconds", ""),
        ([None, "CPU (x86_64)"], "core-seconds", " Validation trials ran on: CPU (x86_64) with torch 2.15.0."),
        (
            ["NVIDIA H200", "CPU (x86_64)"],
            "seconds",
            " Validation trials ran on: CPU (x86_64) with torch 2.15.0; NVIDIA H200 with torch 2.15.0.",
        ),
    ],
)
def test_page_says_what_the_trials_ran_on(
    parts: Any, costs: Any, devices: list[str | None], unit: str, sentence: str
) -> None:
    """The first lines of the logs do not say it."""
    trials = parts.log.final_trials(costs, None)[: len(devices)]
    entries = [
        make_entry(trial, **parts.lengths.describe_cost(costs, trial.way, trial.plan), version="1")
        | ({} if device is None else {"device": device, "torch": "2.15.0"})
        for trial, device in zip(trials, devices, strict=True)
    ]
    text = parts.page.markdown(parts.page.Results(costs.study, entries), None)
    assert f" Versions: 1.{sentence}\n" in text
    assert f"| {unit} |\n" in text


def test_page_of_a_finished_study_follows_from_its_log(parts: Any) -> None:
    """These are in the repository. A study without primary comparisons has no table of them."""
    page = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    studies = {"digits": True, "digits-controls": False, "cifar20": True, "cifar20-32": False, "docs-llama": True}
    for name, has_table in studies.items():
        study = parts.definition.load_study(name)
        chosen, _ = parts.log.read_chosen(study)
        results = parts.page.Results(study.with_best(chosen), parts.log.TrialLog(study.log_file).read())
        text = parts.page.markdown(results, f"ways_{name.replace('-', '_')}.png")
        assert text in page
        assert ("| way | rival |" in text) == has_table
        assert ("All rows are exploratory." in text) != has_table
        assert text.endswith("Missing: nothing.\n")


def test_workers_are_trained_with_the_settings_of_fine_tuning(parts: Any, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["finetune.train.lr=7e-4", "finetune.export=ema", "ema.decay=0.9"])
    changed = parts.trial.recipe_from_weights(recipe, tmp_path / "average")
    assert changed.pretrain.model_dump()["train"] == recipe.finetune.model_dump()["train"]
    assert changed.pretrain.export == "ema"
    assert changed.meta.init == str(tmp_path / "average")
    assert changed.plan.meta_depths == changed.plan.target_depths == [8, 8, 8, 8]
    (tmp_path / "average.toml").write_text(changed.toml())
    assert load_recipe(tmp_path / "average.toml") == changed


def test_mean_of_models_is_an_artifact(parts: Any, tmp_path: Path) -> None:
    # a model of transformers starts from an artifact, not from a file of weights
    import torch

    from bigincubate.storage.artifacts import ArtifactManifest, load_artifact, save_artifact

    model = {
        "task": {"name": "causal_lm"},
        "model": {"name": "llama", "library": "transformers"},
        "depths": [[1]],
        "metadata": {},
    }
    manifest = ArtifactManifest.model_validate(
        {"kind": "model", "phase": "pretrain", "model": model, "weights": "raw", "identity": {}, "data": ""}
    )
    for number in (1.0, 3.0):
        save_artifact(tmp_path / f"{number:g}", {"weight": torch.full((2,), number)}, manifest)
    parts.trial.average_weights([tmp_path / "1", tmp_path / "3"], tmp_path / "mean")
    tensors, found = load_artifact(tmp_path / "mean")
    assert tensors["weight"].tolist() == [2.0, 2.0]
    assert found.model == manifest.model


# ------------------------------------------------------------------------------------------------ language model


def test_budgets_in_tflops_are_absolute(parts: Any, text_costs: Any) -> None:
    trials = [*parts.log.tuning_trials(text_costs), *parts.log.final_trials(text_costs, None)]
    assert {trial.way.name for trial in trials} == set(text_costs.study.ways)
    for trial in trials:
        used = trial.plan.flops if trial.way.measure == "flops" else trial.plan.path_flops
        assert 0.995 * trial.budget * 1e12 <= used <= trial.budget * 1e12


def test_modules_of_a_decentralized_way_read_their_part(parts: Any, text_costs: Any) -> None:
    study = text_costs.study
    for name, wanted in (("decentralized", True), ("decentralized_path", True), ("incubate_short", False)):
        plan = parts.log.plan_trial(
            text_costs, study.ways[name], study.draw(study.ways["incubate_short"], 0), 12, "validation"
        )
        assert study.load_recipe("validation", plan.sets).data.decentralized is wanted


def test_study_of_the_language_model_takes_30_core_hours_at_most(parts: Any, text_costs: Any) -> None:
    study = text_costs.study.with_best(None)
    trials = [*parts.log.tuning_trials(text_costs)]
    trials += parts.log.final_trials(costs_of(parts, text_costs, study), None)
    assert sum(trial.plan.flops for trial in trials) / study.rate / 3600 <= 30


def test_best_ways_on_the_development_split_get_the_largest_budget(parts: Any, text_costs: Any) -> None:
    study = text_costs.study
    values = {"incubate_short": 2.0, "expand": 1.0, "end_to_end": 5.0, "meta_alone": 3.0, "decentralized": 4.0}
    chosen = {name: {"12": {"bits_per_byte": value}} for name, value in values.items()}
    ways = study.with_best(chosen).ways
    assert {name for name, way in ways.items() if 50 in way.budgets} == {"incubate_short", "expand", "meta_alone"}
    assert list(ways) == list(study.ways)
    assert {name for name, way in study.with_best(None).ways.items() if 50 in way.budgets} == {
        "incubate_short",
        "expand",
        "end_to_end",
    }


def test_settings_are_chosen_by_the_metric_of_the_study(parts: Any, text_costs: Any) -> None:
    trials = parts.log.tuning_trials(text_costs)
    results = {trial.key: make_entry(trial, float(trial.index)) for trial in trials}
    for entry in results.values():
        entry["metrics"]["bits_per_byte"] = 20.0 - entry["index"]
    row = tomllib.loads(parts.log.choose_settings(text_costs, results))["decentralized"]["12"]
    assert (row["index"], row["bits_per_byte"]) == (11, 9.0)


def test_page_has_the_metric_the_margin_and_the_aim(parts: Any, text_costs: Any) -> None:
    study = text_costs.study
    values = {
        "incubate_short": 2.01,
        "expand": 2.0,
        "incubate_short_path": 1.97,
        "expand_average": 1.98,
        "expand_best": 1.0,
    }
    entries = [
        make_entry(
            trial, 9.0, **parts.lengths.describe_cost(text_costs, trial.way, trial.plan), version="1", seconds=1.0
        )
        for trial in parts.log.final_trials(text_costs, None)
        if trial.way.name in values and trial.budget == 25
    ]
    for entry in entries:
        noise = 0.001 * (entry["seed"] % 2) * (entry["way"] in ("incubate_short", "incubate_short_path"))
        entry["metrics"] |= {"bits_per_byte": values[entry["way"]] + noise, "accuracy": 50.0}
    text = parts.page.markdown(parts.page.Results(study, entries), None)
    assert "bits per byte, mean (lowest to highest) | next byte, % |" in text
    rows = [row.split(" | ") for row in text.splitlines() if row.count("|") == 10]
    verdicts = [(row[2], row[7], row[8].removesuffix(" |")) for row in rows[2:6]]
    assert verdicts == [
        ("FLOPs", "not behind", "reached"),
        ("critical path", "ahead", "reached"),
        ("critical path", "ahead", "missed"),  # by 0.01 only
        ("critical path", "behind", "missed"),
    ]
    assert "excludes what is 0.02 bits per byte worse" in text
    assert "ahead by 0.02 bits per byte or more on average at equal critical path" in text
