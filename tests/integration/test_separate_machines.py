"""The script `examples/separate_machines.py`, on real runs at smoke size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bigincubate as bi

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize(("decentralized", "optimizer"), [(False, "fresh"), (True, "kept")])
def test_module_is_trained_on_a_separate_machine(
    harness: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    decentralized: bool,
    optimizer: str,
) -> None:
    """The run and its data cannot be reached while the module is trained, and it has the bits of one trained here."""
    import separate_machines

    from bigincubate.data.partitions import partition_by_class
    from bigincubate.data.prepare import prepare_dataset
    from bigincubate.report.verify import Verdict, verify_run

    here, there = tmp_path / "here", tmp_path / "there"
    divide = (lambda samples: partition_by_class(samples, parts=2)) if decentralized else None
    prepare_dataset("digits-dev", here / "data", partition=divide)
    setting = f"data.decentralized={str(decentralized).lower()}"
    starts = ("incubate.init=grow", f"incubate.optimizer={optimizer}")
    sets = ("train.max_steps=3", "log.every_steps=1", f"data.path={here / 'data'}", setting, *starts)
    made = harness(*sets, folder=here / "run")
    with pytest.raises(bi.errors.ArtifactError, match="no artifact"):
        separate_machines.main("pack", str(here / "run"), "1", str(here / "bundle"))
    made.train("pretrain")
    separate_machines.main("pack", str(here / "run"), "1", str(here / "bundle"))

    there.mkdir()
    (here / "bundle").rename(there / "bundle")
    here.rename(tmp_path / "away")
    with monkeypatch.context() as patch:
        patch.chdir(there)
        separate_machines.main("train", "bundle")
    (tmp_path / "away").rename(here)
    if decentralized:
        assert sorted(path.name for path in (there / "bundle" / "data" / "parts").iterdir()) == ["01"]
        assert not list((there / "bundle" / "data").glob("train*"))

    separate_machines.main("collect", str(there / "bundle"), str(here / "run"))
    assert "module 1: collected from" in capsys.readouterr().out
    with pytest.raises(bi.errors.ConfigError, match="has begun already"):
        separate_machines.main("collect", str(there / "bundle"), str(here / "run"))
    made.train("incubate", 0)
    assert made.run.phase("incubate", 0).partial["joined"] == [0, 1]
    made.train("finetune")
    assert {finding.verdict for finding in verify_run(made.run)} == {Verdict.GOOD}
    other = made.copy(tmp_path / "other", ["meta"])
    other.train("incubate", 1)
    weights = made.weights("incubate", 1)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.weights("incubate", 1).items())


def test_module_of_another_meta_model_is_not_collected(harness: Callable[..., Any], tmp_path: Path) -> None:
    import separate_machines

    made = harness("train.max_steps=2")
    made.train("pretrain")
    separate_machines.pack(made.run.path, 0, tmp_path / "bundle")
    with pytest.raises(FileExistsError):
        separate_machines.pack(made.run.path, 0, tmp_path / "bundle")
    separate_machines.train(tmp_path / "bundle")
    other = harness("train.max_steps=2", "train.seed=1")
    other.train("pretrain")
    with pytest.raises(bi.errors.ArtifactError, match=r"does not fit .*train\.seed"):
        separate_machines.collect(tmp_path / "bundle", other.run.path)
    assert not other.run.phase("incubate", 0).path.exists()
