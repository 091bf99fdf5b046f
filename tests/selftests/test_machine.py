# SPDX-License-Identifier: MIT OR Apache-2.0
"""The conversation with machines, which end at any moment; a program that says its part stands in for vm/run."""

import sys
from pathlib import Path

import pytest
from linux_selftests import machine, observation
from linux_selftests.build import Selftests
from linux_selftests.observation import Observation


class Stage:
    """A repository whose vm/run plays one act after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "vm").mkdir()
        (directory / "acts").mkdir()
        program = directory / "vm/run"
        program.write_text(
            f"#!{sys.executable}\n"
            "import sys, time\n"
            "from pathlib import Path\n"
            f"acts = Path({str(directory / 'acts')!r})\n"
            "act = min(acts.glob('*.py'))\n"
            "text = act.read_text()\n"
            "act.rename(act.with_suffix('.played'))\n"
            "Path(acts, act.stem + '.arguments').write_text('\\n'.join(sys.argv[1:]))\n"
            "exec(text)\n"
        )
        program.chmod(0o755)
        self.begun: list[str] = []
        self.ended: list[Observation] = []
        self.notes: list[str] = []
        self._acts = 0

    def act(self, *lines: str, status: int = 0, last: str = "") -> None:
        self._acts += 1
        text = "".join(f"print({line!r}, flush=True)\n" for line in lines)
        (self.directory / f"acts/{self._acts}.py").write_text(f"{text}{last}\nsys.exit({status})\n")

    def arguments(self, act: int) -> list[str]:
        return (self.directory / f"acts/{act}.arguments").read_text().splitlines()

    def run(self, *scripts: str, limit: float = 30.0) -> machine.Tally:
        options = machine.Options(
            repository=self.directory,
            selftests=Selftests(self.directory, "a package"),
            kernel="7.3",
            driver="intree",
            memory="4G",
            limit=limit,
            results=self.directory / "results",
        )
        return machine.run(options, list(scripts), self.begun.append, self.ended.append, self.notes.append)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def played(script: str, **values) -> list[str]:
    return [observation.begin(script), observation.end(Observation(script, status=0, **values))]


def test_one_machine_for_all_that_goes_well(stage):
    stage.act(*played("a"), *played("b"))
    tally = stage.run("a", "b")
    assert tally.statuses == [0]
    assert stage.begun == ["a", "b"]
    assert [seen.script for seen in stage.ended] == ["a", "b"]
    assert not any(seen.machine for seen in stage.ended)
    assert not stage.notes
    assert stage.arguments(1)[-2:] == ["a", "b"]
    assert "--no-build" not in stage.arguments(1)


def test_a_machine_that_dies_costs_one_script(stage):
    stage.act(
        *played("a"),
        observation.begin("b"),
        status=123,
        last="print('vm: the guest\\'s kernel failed: BUG: x', file=sys.stderr)",
    )
    stage.act(*played("c"))
    tally = stage.run("a", "b", "c")
    assert tally.statuses == [123, 0]
    assert [seen.script for seen in stage.ended] == ["a", "b", "c"]
    assert "123" in stage.ended[1].machine
    assert "BUG: x" in stage.ended[1].machine
    assert stage.arguments(2)[-1] == "c"
    assert "--no-build" in stage.arguments(2)
    # The script during which it died reports it.
    assert not tally.unexplained


def test_a_machine_that_cannot_go_on_is_replaced(stage):
    stage.act(*played("a", residue="nodes: /dev/ublkc0"), observation.unfit("cannot be removed"))
    stage.act(*played("b"))
    assert stage.run("a", "b").statuses == [0, 0]
    assert "cannot be removed" in stage.notes[0]


@pytest.mark.parametrize("status", [1, 123])
def test_a_bad_end_that_no_script_shows_is_told(stage, status):
    stage.act(*played("a"), status=status)
    assert len(stage.run("a").unexplained) == 1


def test_a_fault_of_the_kernel_that_a_script_shows_is_told_once(stage):
    stage.act(*played("a", kernel_trouble=["WARNING: x"]), status=123)
    assert not stage.run("a").unexplained


def test_machines_that_do_not_start_are_not_tried_for_ever(stage):
    stage.act(status=125, last="print('vm: there is no kernel', file=sys.stderr)")
    with pytest.raises(machine.MachineError, match="there is no kernel"):
        stage.run("a")


def test_a_machine_that_is_silent_is_ended(stage, monkeypatch):
    monkeypatch.setattr(machine, "_AROUND", 0.0)
    stage.act(observation.begin("a"), last="time.sleep(600)")
    stage.act(*played("b"))
    stage.run("a", "b", limit=1.0)
    assert [seen.script for seen in stage.ended] == ["a", "b"]
    assert "said nothing" in stage.ended[0].machine


def test_noise_between_events_is_no_event(stage, capsys):
    stage.act("Traceback or other noise", *played("a"))
    stage.run("a")
    assert [seen.script for seen in stage.ended] == ["a"]
    assert "other noise" in capsys.readouterr().err
