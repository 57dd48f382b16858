from pathlib import Path

from diva_lab.messages import MOST, expected, nearest, read_from


def test_the_nearest_name_is_named_before_all_of_a_few():
    assert expected("stps", ["seeds", "steps"]) == "did you mean 'steps'? expected one of seeds, steps"
    assert expected("xyz", ["seeds", "steps"]) == "expected one of seeds, steps"
    assert nearest(3, ["a"]) == "" == nearest("zzz", ["a"])


def test_of_many_names_the_first_are_listed_with_their_number():
    names = [f"name{k:03}" for k in range(MOST + 1)]
    text = expected("zzz", names)
    assert text.endswith(f"{names[MOST - 1]} ... ({MOST + 1} in all)") and names[MOST] not in text


def test_only_a_relative_path_says_where_it_was_read_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_from("here") == f" in {tmp_path}" and read_from(str(Path("here").absolute())) == ""
