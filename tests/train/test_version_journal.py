"""Numbers of policies over the sessions of a run."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ember_ray.train.version_journal import FILE, VersionJournal

SESSIONS = st.lists(st.lists(st.tuples(st.integers(1, 6), st.sampled_from("abc")), max_size=5), max_size=4)


@given(SESSIONS)
def test_a_number_never_names_two_policies(tmp_path_factory, sessions: list[list[tuple[int, str]]]) -> None:
    folder = tmp_path_factory.mktemp("run")
    named: dict[int, str] = {}
    for session in sessions:
        journal = VersionJournal(folder)
        for wanted, digest in session:
            version = journal.number(wanted, digest)
            assert named.get(version, digest) == digest
            if version not in named:
                assert version >= wanted and version > max(named, default=0)
            named[version] = digest
            assert journal.number(version, digest) == version


def test_a_resumed_round_keeps_its_number_if_it_is_the_same(tmp_path: Path) -> None:
    first = VersionJournal(tmp_path / "learner")
    assert [first.number(version, digest) for version, digest in ((1, "a"), (2, "b"))] == [1, 2]
    assert VersionJournal(tmp_path / "learner").number(2, "b") == 2
    assert VersionJournal(tmp_path / "learner").number(2, "other") == 3


def test_a_line_cut_off_is_passed_over(tmp_path: Path) -> None:
    VersionJournal(tmp_path).number(1, "a")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"version": 2, "dig')
    assert VersionJournal(tmp_path).number(2, "b") == 2
    assert VersionJournal(tmp_path).number(2, "c") == 3
